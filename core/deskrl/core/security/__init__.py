"""Authentication and authorisation between roles: certificates, identities, interceptor."""
