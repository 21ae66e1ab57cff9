"""One object for each array library, which answers all that polyce asks about arrays."""
