"""What executes a program: the two loops, their buffers and messages, the operators."""
