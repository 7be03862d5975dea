"""Training loops of other libraries. Nothing is imported here: each module needs the library that it is named after."""
