"""The commands of ``trady``, one a file."""
