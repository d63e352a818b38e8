//! Who may ask: API keys, and the tenant that each stands for.

use std::fmt;
use std::path::{Path, PathBuf};

use protocol::TenantId;
use thiserror::Error;

/// The keys that a node accepts. Only hashes are kept.
#[derive(Clone, Default)]
pub struct ApiKeys {
    keys: Vec<ApiKey>,
}

#[derive(Clone)]
struct ApiKey {
    name: String,
    hash: blake3::Hash,
    tenant: TenantId,
}

/// A list of keys that cannot be used.
#[derive(Debug, Error)]
pub enum ApiKeysError {
    #[error("cannot read the key file {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("key {line}: expected name:key[:tenant], with a key of at least {KEY_BYTES_MIN} bytes")]
    Malformed { line: usize },
    #[error("key {line}: the tenant must be 1 to 128 letters, digits, '.', '_' or '-'")]
    BadTenant { line: usize },
    #[error("key {line}: the name {name:?} or its key stands there twice")]
    Duplicate { line: usize, name: String },
    #[error("more than {KEYS_MAX} keys: every request is compared with each of them")]
    TooMany,
}

impl ApiKeys {
    /// Keys from text: one `name:key[:tenant]` on each line or between commas; blank lines and
    /// lines that begin with `#` are skipped. Without a tenant the name is the tenant.
    pub fn parse(text: &str) -> Result<ApiKeys, ApiKeysError> {
        let mut keys: Vec<ApiKey> = Vec::new();
        let entries = text
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'))
            .flat_map(|line| line.split(','))
            .map(str::trim)
            .filter(|entry| !entry.is_empty());
        for (i, entry) in entries.enumerate() {
            let line = i + 1;
            if line > KEYS_MAX {
                return Err(ApiKeysError::TooMany);
            }
            let mut parts = entry.splitn(3, ':').map(str::trim);
            let (name, key) = match (parts.next(), parts.next()) {
                (Some(name), Some(key)) if !name.is_empty() && key.len() >= KEY_BYTES_MIN => {
                    (name, key)
                }
                _ => return Err(ApiKeysError::Malformed { line }),
            };
            let tenant = TenantId::new(parts.next().unwrap_or(name))
                .ok_or(ApiKeysError::BadTenant { line })?;
            let hash = blake3::hash(key.as_bytes());
            if keys.iter().any(|k| k.name == name || k.hash == hash) {
                return Err(ApiKeysError::Duplicate { line, name: name.to_owned() });
            }
            keys.push(ApiKey { name: name.to_owned(), hash, tenant });
        }
        Ok(ApiKeys { keys })
    }

    /// Keys from the environment: `VINE_API_KEY` holds one key, of the tenant `local`, or a list in
    /// the form of [`ApiKeys::parse`]. None where it is not set.
    pub fn from_env() -> Result<ApiKeys, ApiKeysError> {
        ApiKeys::from_env_of(API_KEY_VARIABLE)
    }

    /// The same from another variable, as [`ADMIN_KEY_VARIABLE`].
    pub fn from_env_of(variable: &str) -> Result<ApiKeys, ApiKeysError> {
        match std::env::var(variable) {
            Ok(value) => ApiKeys::from_variable(&value),
            Err(_) => Ok(ApiKeys::default()),
        }
    }

    fn from_variable(value: &str) -> Result<ApiKeys, ApiKeysError> {
        match value.trim() {
            key if key.is_empty() || key.contains(':') => ApiKeys::parse(key),
            key => ApiKeys::parse(&format!("env:{key}:local")),
        }
    }

    /// Keys from a file, in the form of [`ApiKeys::parse`].
    pub fn from_file(path: &Path) -> Result<ApiKeys, ApiKeysError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ApiKeysError::Read { path: path.to_owned(), source })?;
        ApiKeys::parse(&text)
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// The key's name and tenant. Takes the same time whichever key matches, or none: hashes are
    /// compared in constant time, and always all of them.
    pub fn check(&self, key: &str) -> Option<(&str, &TenantId)> {
        let hash = blake3::hash(key.as_bytes());
        let mut found = None;
        for known in &self.keys {
            if known.hash == hash {
                found = Some((known.name.as_str(), &known.tenant));
            }
        }
        found
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|k| (&k.name, &k.tenant))).finish()
    }
}

/// The environment variable that [`ApiKeys::from_env`] reads.
pub const API_KEY_VARIABLE: &str = "VINE_API_KEY";
/// The same for those who may change the mesh.
pub const ADMIN_KEY_VARIABLE: &str = "VINE_ADMIN_KEY";
/// Shortest key: shorter ones can be guessed over the network.
pub const KEY_BYTES_MIN: usize = 8;
/// Most keys.
pub const KEYS_MAX: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        for (text, expect) in [
            ("", Ok(0)),
            ("# nothing\n\n", Ok(0)),
            ("ann:sk-0123456789", Ok(1)),
            ("ann:sk-0123456789:acme, bob:sk-9876543210", Ok(2)),
            ("ann:sk-0123456789\nbob:sk-9876543210:acme\n", Ok(2)),
            ("ann", Err("expected name:key")),
            ("ann:short", Err("expected name:key")),
            (":sk-0123456789", Err("expected name:key")),
            ("ann:sk-0123456789:a b", Err("the tenant must be")),
            ("an n:sk-0123456789", Err("the tenant must be")),
            ("ann:sk-0123456789,ann:sk-other-key", Err("twice")),
            ("ann:sk-0123456789,bob:sk-0123456789", Err("twice")),
        ] {
            match (ApiKeys::parse(text), expect) {
                (Ok(keys), Ok(count)) => assert_eq!(keys.len(), count, "{text:?}"),
                (Err(e), Err(part)) => assert!(e.to_string().contains(part), "{text:?}: {e}"),
                (got, _) => panic!("{text:?}: {got:?}"),
            }
        }
    }

    #[test]
    fn the_variable_holds_a_key_or_a_list() {
        let keys = ApiKeys::from_variable("sk-0123456789").unwrap();
        assert_eq!(keys.check("sk-0123456789"), Some(("env", &TenantId::local())));
        let keys = ApiKeys::from_variable("ann:sk-0123456789,bob:sk-9876543210").unwrap();
        assert_eq!(keys.len(), 2);
        assert!(ApiKeys::from_variable(" ").unwrap().is_empty());
        assert!(ApiKeys::from_variable("short").is_err());
    }

    #[test]
    fn a_key_gives_its_tenant_and_stays_hidden() {
        let keys = ApiKeys::parse("ann:sk-0123456789:acme\nbob:sk-9876543210").unwrap();
        assert_eq!(keys.check("sk-0123456789"), Some(("ann", &TenantId::new("acme").unwrap())));
        assert_eq!(keys.check("sk-9876543210"), Some(("bob", &TenantId::new("bob").unwrap())));
        assert_eq!(keys.check("sk-012345678"), None);
        assert_eq!(keys.check(""), None);
        assert!(!format!("{keys:?}").contains("sk-"));
    }
}
