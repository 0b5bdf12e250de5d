"""Everything that measures; each file is a program, its results lie in results/."""
