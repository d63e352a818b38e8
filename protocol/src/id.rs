//! Identifiers. Each is a newtype, so that one cannot be passed for another.

use std::fmt;

use data_encoding::BASE32_NOPAD_NOCASE;

/// A token of a model's vocabulary.
pub type TokenId = u32;

/// One sequence in a replica: a request has `n` of them. Unique for the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// One request as its ingress named it; appears in logs, events and errors as `req-<hex>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u128);

/// The owner of a request. Every resource key begins with it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(String);

/// Longest tenant name accepted, in bytes.
pub const TENANT_BYTES_MAX: usize = 128;

impl TenantId {
    /// The tenant of a node that has no keys configured.
    pub fn local() -> Self {
        TenantId("local".to_owned())
    }

    /// A tenant by name: 1 to 128 bytes of `[A-Za-z0-9._-]`.
    pub fn new(name: &str) -> Option<Self> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let fits = (1..=TENANT_BYTES_MAX).contains(&name.len());
        (fits && name.bytes().all(plain)).then(|| TenantId(name.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A node: its Ed25519 public key, which is its identity on both planes.
///
/// Shown as 52 characters of lower-case base32 (RFC 4648, no padding); [`NodeId::short`] shows the
/// first eight, which people can compare.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, bincode::Encode, bincode::Decode)]
pub struct NodeId(pub [u8; 32]);

/// A mesh: the BLAKE3 hash of its root public key. Shown like a [`NodeId`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, bincode::Encode, bincode::Decode)]
pub struct MeshId(pub [u8; 32]);

/// What makes a 32-byte id readable, and readable again.
macro_rules! base32_id {
    ($id:ident) => {
        impl $id {
            /// The first eight characters of the id: enough to tell the nodes of a mesh apart by eye,
            /// never enough to identify one.
            pub fn short(&self) -> String {
                self.to_string()[..8].to_owned()
            }
        }

        impl fmt::Display for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&BASE32_NOPAD_NOCASE.encode(&self.0).to_ascii_lowercase())
            }
        }

        impl fmt::Debug for $id {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($id), "({})"), self.short())
            }
        }

        impl std::str::FromStr for $id {
            type Err = BadId;

            fn from_str(s: &str) -> Result<Self, BadId> {
                let bytes = BASE32_NOPAD_NOCASE.decode(s.as_bytes()).map_err(|_| BadId)?;
                bytes.try_into().map($id).map_err(|_| BadId)
            }
        }
    };
}

base32_id!(NodeId);
base32_id!(MeshId);

/// A node or mesh id that is not 52 characters of base32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an id is 52 letters a-z and digits 2-7")]
pub struct BadId;

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seq-{}", self.0)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "req-{:032x}", self.0)
    }
}

impl std::str::FromStr for RequestId {
    type Err = ();

    fn from_str(s: &str) -> Result<Self, ()> {
        let hex = s.strip_prefix("req-").filter(|h| h.len() == 32).ok_or(())?;
        u128::from_str_radix(hex, 16).map(RequestId).map_err(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenant_names() {
        for (name, ok) in [("acme", true), ("a.b_c-9", true), ("", false), ("a b", false)] {
            assert_eq!(TenantId::new(name).is_some(), ok, "{name:?}");
        }
        assert!(TenantId::new(&"x".repeat(TENANT_BYTES_MAX + 1)).is_none());
    }

    #[test]
    fn node_id_round_trip() {
        let id = NodeId(std::array::from_fn(|i| i as u8));
        assert_eq!(id.to_string(), "aaaqeayeaudaocajbifqydiob4ibceqtcqkrmfyydenbwha5dypq");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
        assert_eq!(id.short(), "aaaqeaye");
        for bad in ["", "a", "aaaqeaye", "1".repeat(52).as_str(), "a".repeat(60).as_str()] {
            assert_eq!(bad.parse::<NodeId>(), Err(BadId), "{bad:?}");
        }
    }

    #[test]
    fn request_id_round_trip() {
        let id = RequestId(0xfeed);
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "req-", "req-zz", "req-123", "feed"] {
            assert_eq!(bad.parse::<RequestId>(), Err(()), "{bad:?}");
        }
    }
}
