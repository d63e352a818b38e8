//! OpenAI API types.
