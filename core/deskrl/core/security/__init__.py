"""Who may talk to whom: certificates, identities, and the door at which they are asked for."""
