"""Which layers matter: scores, given, shipped, learnt online, or guessed from shapes."""
