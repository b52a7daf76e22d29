"""The contracts between the roles; the stubs beside each .proto are generated at install time."""
