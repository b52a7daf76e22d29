"""The commands of the command line, by what a person does with them.

Each module adds its commands to the parser; a command is its options and the function that performs it, which imports
what it needs only then. No module knows another one's commands.
"""
