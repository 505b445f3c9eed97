// Runs launches of the schedule whole: every kind, given and drawn times, tails of blocks, guards.
#include "../cases.h"
#include "schedule/schedule_body.h"

namespace {

template <typename T>
void expect(const ScheduleArguments& a, int64_t i, double tolerance) {
  T t = static_cast<T*>(a.t)[i], y[4];
  if (a.seed != nullptr) {
    const int64_t index = a.offset + i;
    const Words w =
        philox4x32(static_cast<uint64_t>(*a.seed), static_cast<uint64_t>(index / 4), static_cast<uint64_t>(a.stream));
    const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
    CHECK(t == static_cast<T>(static_cast<double>(words[index % 4] >> 8) * 0x1p-24), "drawn time %lld",
          static_cast<long long>(i));
  }
  schedule_at(a.kind, static_cast<T>(a.a), static_cast<T>(a.b), t, y);
  for (int k = 0; k < 4; ++k) {
    const double got = static_cast<double>(static_cast<T*>(a.out)[k * a.count + i]), wanted = static_cast<double>(y[k]);
    CHECK(near(got, wanted, tolerance * std::fabs(wanted)), "kind %d value %d of %lld at t = %g: %g, expected %g",
          static_cast<int>(a.kind), k, static_cast<long long>(a.count), static_cast<double>(t), got, wanted);
  }
}

void test_schedule() {
  ScheduleArguments a{};
  a.kind = static_cast<ScheduleKind>(pick(0, 5));
  a.dtype = coin() ? Dtype::f32 : Dtype::f64;
  a.a = 0.1 + 0.8 * static_cast<double>(pick(0, 10)) / 10 + (a.kind == ScheduleKind::polynomial ? 1.0 : 0.0);
  a.b = a.a + static_cast<double>(pick(0, 10));
  a.count = coin() ? pick(1, 10) : pick(1, 3000);
  const int bytes = bytes_of(a.dtype);
  const Array t(a.count, bytes, coin()), out(4 * a.count, bytes, coin());
  a.t = t.data();
  a.out = out.data();
  const int64_t seed = pick(-1000, 1000);
  if (coin()) {
    a.seed = &seed;
    a.stream = pick(0, 5);
    a.offset = pick(0, 9);
  } else {
    for (int64_t i = 0; i < a.count; ++i) store_scalar(a.t, a.dtype, i, static_cast<double>(pick(0, 1000)) / 1000);
  }
  CHECK(schedule_cuda(a, nullptr) == Status::ok, "schedule");
  for (int64_t i = 0; i < a.count; ++i) a.dtype == Dtype::f64 ? expect<double>(a, i, 1e-15) : expect<float>(a, i, 1e-6);
  CHECK(t.guarded() && out.guarded(), "schedule");
  a.dtype = Dtype::bf16;
  CHECK(schedule_cuda(a, nullptr) == Status::bad_argument, "schedule");
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
  for (int round = 0; round < rounds; ++round) test_schedule();
  return verdict(rounds);
}
