"""What the random operation writes; the codes of csrc/random/random.h."""

WORDS = 0
UNIFORM = 1
NORMAL = 2
