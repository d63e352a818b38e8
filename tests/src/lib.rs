//! Repository rules and the tests that need the whole workspace; see `tests/tests/`.
