"""Router traces of Switch Transformers: where models and text come from, what is logged, how it is stored."""
