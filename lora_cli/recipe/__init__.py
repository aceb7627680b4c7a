"""The YAML recipe: schema, loading, validation and adapter methods. No torch."""
