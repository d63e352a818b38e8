//! A JSON object with the file it came from, so that each error can name both.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::weights::ModelError;

/// An object of a file; `prefix` is the path of keys that leads to it.
#[derive(Clone, Debug)]
pub(super) struct Object {
    pub file: PathBuf,
    prefix: String,
    pub map: Map<String, Value>,
}

/// Reads a small file whole; none if it is not there.
pub(super) fn read_file(path: &Path, max: u64) -> Result<Option<Vec<u8>>, ModelError> {
    let unreadable = |error: std::io::Error| ModelError::Unreadable {
        file: path.to_owned(),
        reason: error.to_string(),
    };
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(error)),
    };
    if !meta.is_file() || meta.len() > max {
        let reason = format!("not a regular file of at most {max} bytes");
        return Err(ModelError::File { file: path.to_owned(), reason });
    }
    std::fs::read(path).map(Some).map_err(unreadable)
}

impl Object {
    /// Reads a file that holds one object; none if it is not there.
    pub fn read(path: &Path) -> Result<Option<Object>, ModelError> {
        let Some(bytes) = read_file(path, JSON_BYTES_MAX)? else { return Ok(None) };
        let refuse = |reason: String| ModelError::File { file: path.to_owned(), reason };
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(map)) => {
                Ok(Some(Object { file: path.to_owned(), prefix: String::new(), map }))
            }
            Ok(_) => Err(refuse("it is not a JSON object".to_owned())),
            Err(error) => Err(refuse(format!("it is not JSON: {error}"))),
        }
    }

    /// The value of a key that is there and not null.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub fn optional<'v, T>(
        &'v self,
        key: &str,
        expected: &str,
        read: impl Fn(&'v Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.wrong(key, shown(value), expected))
    }

    pub fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.optional(key, "a whole number", |value| {
            value.as_u64().and_then(|size| usize::try_from(size).ok())
        })
    }

    pub fn required_size(&self, key: &str) -> Result<usize, ModelError> {
        self.size(key)?.ok_or_else(|| self.missing(key, "a whole number"))
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.optional(key, "a number", Value::as_f64)
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.optional(key, "true or false", Value::as_bool)
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        self.optional(key, "a text", Value::as_str)
    }

    pub fn object(&self, key: &str) -> Result<Option<Object>, ModelError> {
        let map = self.optional(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Object {
            file: self.file.clone(),
            prefix: format!("{}{key}.", self.prefix),
            map: map.clone(),
        }))
    }

    pub fn missing(&self, key: &str, expected: &str) -> ModelError {
        ModelError::MissingKey {
            file: self.file.clone(),
            key: format!("{}{key}", self.prefix),
            expected: expected.to_owned(),
        }
    }

    pub fn wrong(&self, key: &str, value: String, expected: &str) -> ModelError {
        ModelError::Config {
            file: self.file.clone(),
            key: format!("{}{key}", self.prefix),
            value,
            expected: expected.to_owned(),
        }
    }
}

/// A value as an error shows it.
pub(super) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// Of any JSON file but the tokenizer's.
const JSON_BYTES_MAX: u64 = 32 << 20;
const SHOWN_CHARS_MAX: usize = 80;
