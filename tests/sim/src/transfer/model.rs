//! A stand-in for a language model: what a block holds, and which token comes next, are hashes of
//! everything that they depend on.

use cache::transfer::BlockDigest;
use cache::{BlockHash, HashChain, NumericalIdentity, TenantSalt};
use protocol::transfer::{KvDtype, KvFormat};
use protocol::{TenantId, TokenId};

/// The bytes of a block.
pub type Content = [u8; CONTENT_BYTES];

/// A model as one node serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Model {
    /// Other weights, other bytes.
    pub weights: u8,
    pub dtype: KvDtype,
    pub block_tokens: u16,
}

/// What a request asks, and for whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    pub tenant: TenantId,
    pub tokens: Vec<TokenId>,
}

impl Model {
    pub fn format(&self) -> KvFormat {
        KvFormat {
            identity: [self.weights; 32],
            layer_first: 0,
            layers: 2,
            block_tokens: self.block_tokens,
            dtype: self.dtype,
            block_bytes: CONTENT_BYTES as u32,
        }
    }

    /// The names of the prompt's full blocks. With `salted` false, the tenant is left out of them:
    /// that is a fault.
    pub fn names(&self, prompt: &Prompt, salted: bool) -> Vec<BlockHash> {
        let everyone = TenantId::local();
        let tenant = if salted { &prompt.tenant } else { &everyone };
        let salt = TenantSalt::derive(b"the simulator's secret of 32 by.", tenant);
        let parts = cache::IdentityParts {
            weights: &[self.weights],
            architecture: "simulated",
            kv_dtype: match self.dtype {
                KvDtype::F32 => "f32",
                KvDtype::F16 => "f16",
                KvDtype::Bf16 => "bf16",
            },
            rope: "",
            adapter: "",
        };
        let identity = NumericalIdentity::new(&parts);
        let mut chain = HashChain::new(salt, &identity, self.block_tokens.into());
        chain.extend(&prompt.tokens);
        chain.hashes().to_vec()
    }

    /// What the prompt's full blocks hold: each depends on the tenant and on all tokens before its end.
    pub fn contents(&self, prompt: &Prompt) -> Vec<Content> {
        let mut before = [0; 32];
        let blocks = prompt.tokens.chunks_exact(self.block_tokens.into());
        let content = blocks.map(|tokens| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&[self.weights, self.dtype as u8]);
            hasher.update(prompt.tenant.as_str().as_bytes());
            hasher.update(&before);
            tokens.iter().for_each(|token| {
                hasher.update(&token.to_le_bytes());
            });
            before = *hasher.finalize().as_bytes();
            before
        });
        content.collect()
    }

    /// The token after the prompt and the `generated` ones, as computed from what the pages hold.
    pub fn next(&self, prompt: &Prompt, pages: &[Content], generated: &[TokenId]) -> TokenId {
        let mut hasher = blake3::Hasher::new();
        pages.iter().for_each(|page| {
            hasher.update(page);
        });
        let tail = prompt.tokens.chunks_exact(self.block_tokens.into()).remainder();
        tail.iter().chain(generated).for_each(|token| {
            hasher.update(&token.to_le_bytes());
        });
        let hash = hasher.finalize();
        u32::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"))
    }

    /// The `n` tokens that every right answer to the prompt consists of.
    pub fn answer(&self, prompt: &Prompt, n: usize) -> Vec<TokenId> {
        let pages = self.contents(prompt);
        let mut answer = Vec::new();
        while answer.len() < n {
            answer.push(self.next(prompt, &pages, &answer));
        }
        answer
    }
}

pub fn digest(name: &BlockHash, content: &Content) -> BlockDigest {
    BlockDigest::of(name, content)
}

pub const CONTENT_BYTES: usize = 32;
