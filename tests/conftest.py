"""What all tests share."""

from hypothesis import settings

# A shared machine may take its time with any one example.
settings.register_profile("trady", deadline=None)
settings.load_profile("trady")
