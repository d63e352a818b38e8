//! Names of KV blocks: a chain of keyed hashes.
//!
//! `h(0) = BLAKE3_keyed(salt, identity)`, `h(i) = BLAKE3_keyed(salt, h(i-1) || tokens(i))`, the tokens
//! of block `i` as little-endian `u32`. A name thus stands for the whole prefix that ends with its
//! block, for the arithmetic that made it, and for the tenant that owns it: without the tenant's salt
//! nobody can tell or guess what another tenant has cached.

use std::fmt;

use protocol::{TenantId, TokenId};

/// Name of a full block: equal names mean equal bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash(pub [u8; 32]);

/// The key of a tenant's hashes. Derived where the node's secret lives, never taken from a client.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TenantSalt([u8; 32]);

/// Everything that decides the bytes of a KV block besides the tokens, as one digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NumericalIdentity([u8; 32]);

/// The labelled parts of a [`NumericalIdentity`]. Two replicas whose parts are equal byte for byte may
/// share blocks; where the layers lie (placement) is no part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdentityParts<'a> {
    /// Digest of the weights as stored.
    pub weights: &'a [u8],
    /// Architecture and its sizes, in a canonical text.
    pub architecture: &'a str,
    /// Element type of keys and values: `f16`, `bf16`, `f32`.
    pub kv_dtype: &'a str,
    /// Rotary embedding: base, scaling and its factors, in a canonical text.
    pub rope: &'a str,
    /// Adapter merged at run time, empty if none.
    pub adapter: &'a str,
}

/// The names of one sequence's blocks, extended as its tokens come: each token is hashed once.
#[derive(Clone, Debug)]
pub struct HashChain {
    salt: TenantSalt,
    block_tokens: usize,
    root: BlockHash,
    hashes: Vec<BlockHash>,
}

impl TenantSalt {
    /// The salt of `tenant` on nodes that hold `secret` (at least 32 random bytes).
    pub fn derive(secret: &[u8], tenant: &TenantId) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(SALT_CONTEXT);
        hasher.update(&(secret.len() as u64).to_le_bytes());
        hasher.update(secret);
        hasher.update(tenant.as_str().as_bytes());
        TenantSalt(*hasher.finalize().as_bytes())
    }
}

impl fmt::Debug for TenantSalt {
    /// Hides the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TenantSalt(..)")
    }
}

impl NumericalIdentity {
    pub fn new(parts: &IdentityParts<'_>) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(IDENTITY_CONTEXT);
        let fields: [(&str, &[u8]); 5] = [
            ("weights", parts.weights),
            ("architecture", parts.architecture.as_bytes()),
            ("kv_dtype", parts.kv_dtype.as_bytes()),
            ("rope", parts.rope.as_bytes()),
            ("adapter", parts.adapter.as_bytes()),
        ];
        for (label, value) in fields {
            // Lengths first: no two lists of fields may give the same bytes.
            for bytes in [label.as_bytes(), value] {
                hasher.update(&(bytes.len() as u64).to_le_bytes());
                hasher.update(bytes);
            }
        }
        NumericalIdentity(*hasher.finalize().as_bytes())
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl HashChain {
    /// The chain of an empty sequence. Panics if `block_tokens` is 0.
    pub fn new(salt: TenantSalt, identity: &NumericalIdentity, block_tokens: usize) -> Self {
        assert!(block_tokens > 0, "a block holds at least one token");
        let root = BlockHash(*blake3::keyed_hash(&salt.0, &identity.0).as_bytes());
        HashChain { salt, block_tokens, root, hashes: Vec::new() }
    }

    /// Names every full block of `tokens` that has no name yet. `tokens` is the whole sequence: what
    /// was named before must not have changed.
    pub fn extend(&mut self, tokens: &[TokenId]) {
        for block in tokens.chunks_exact(self.block_tokens).skip(self.hashes.len()) {
            let parent = self.hashes.last().unwrap_or(&self.root);
            let mut hasher = blake3::Hasher::new_keyed(&self.salt.0);
            hasher.update(&parent.0);
            for token in block {
                hasher.update(&token.to_le_bytes());
            }
            self.hashes.push(BlockHash(*hasher.finalize().as_bytes()));
        }
    }

    /// The name before any block: what [`extend`](Self::extend) hashes the first block after.
    pub fn root(&self) -> BlockHash {
        self.root
    }

    /// Names of the full blocks so far, in order.
    pub fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }
}

/// Gives the blocks of one model their names, for who has only tokens.
#[derive(Clone)]
pub struct Namer {
    secret: [u8; 32],
    identity: NumericalIdentity,
    block_tokens: usize,
}

impl Namer {
    /// Names as a replica gives them that has this secret and identity. Panics if `block_tokens` is 0.
    pub fn new(secret: [u8; 32], identity: NumericalIdentity, block_tokens: usize) -> Self {
        assert!(block_tokens > 0, "a block holds at least one token");
        Namer { secret, identity, block_tokens }
    }

    /// The names of the full blocks of `tokens`, as sequences of that tenant have them.
    pub fn names(&self, tenant: &TenantId, tokens: &[TokenId]) -> Vec<BlockHash> {
        let salt = TenantSalt::derive(&self.secret, tenant);
        let mut chain = HashChain::new(salt, &self.identity, self.block_tokens);
        chain.extend(tokens);
        chain.hashes
    }

    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }
}

impl fmt::Debug for Namer {
    /// Hides the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Namer").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockHash({self})")
    }
}

const SALT_CONTEXT: &str = "grapevine 2026-11-21 tenant salt of kv block hashes v1";
const IDENTITY_CONTEXT: &str = "grapevine 2026-11-21 numerical identity of kv blocks v1";
