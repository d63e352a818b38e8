//! The join exchange: a token, or an old certificate, becomes a certificate.
//!
//! ```text
//! joiner                                    node of the mesh
//!   hello {nonce}                     ──►
//!                                     ◄──   proof {root, authority chain, revocations,
//!                                                  certificate, nonce, signature}
//!   (checks that this is its mesh; has told nothing so far)
//!   claim {token record or old certificate,
//!          signatures of token and node} ──►
//!                                           (counts the use, makes it durable)
//!                                     ◄──   grant {certificate, peers}
//!                                        or elsewhere {authorities} or refusal {reason}
//! ```
//!
//! All signatures cover the **transcript**: the exporter of the TLS connection (RFC 5705, RFC 8446
//! section 7.5), both node ids, both nonces and the mesh. A man in the middle has two TLS connections
//! with two exporters: what one side signs is worth nothing on the other, and nothing is ever sent that
//! could be replayed. [`Joiner`] and [`Issuer`] are the two sides.

mod issuer;
mod joiner;
mod messages;

pub use issuer::{Issuer, IssuerError, IssuerInput, IssuerOutput, IssuerPlace};
pub use joiner::{JoinError, Joined, Joiner, JoinerInput, JoinerOutput, Purpose};
pub use messages::{
    CONTACT_ADDRESSES_MAX, CONTACTS_MAX, Claim, Contact, JOIN_FRAME_BYTES_MAX, JoinClaim,
    JoinElsewhere, JoinGrant, JoinHello, JoinProof, Refusal, decode_any,
};

use crate::wire::DecodeError;
use crate::{Duration, MeshId, NodeId};

use super::key::{NodeKey, Signature};

/// What both sides derived from their TLS connection: exporter label [`EXPORTER_LABEL`], no context.
/// Equal only if they talk to each other without anybody in between.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ChannelBinding(pub [u8; 32]);

/// The label of the TLS exporter.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-grapevine-join-1";

/// Time that each wait of an exchange may take. Too small: slow links cannot join. Too large: whoever
/// says nothing holds a place for that long.
pub const JOIN_WAIT: Duration = Duration::from_secs(10);

/// What the signatures of an exchange cover.
#[derive(Clone, Copy)]
struct Transcript([u8; 32]);

impl Transcript {
    fn new(
        binding: ChannelBinding,
        (joiner, joiner_nonce): (NodeId, [u8; 32]),
        (issuer, issuer_nonce): (NodeId, [u8; 32]),
        mesh: MeshId,
    ) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("grapevine join transcript 1");
        for part in [binding.0, joiner.0, issuer.0, joiner_nonce, issuer_nonce, mesh.0] {
            hasher.update(&part);
        }
        Transcript(*hasher.finalize().as_bytes())
    }

    fn sign(&self, signer: Signer, about: &[u8], key: &NodeKey) -> Signature {
        key.sign(&self.message(signer, about))
    }

    fn verifies(&self, signer: Signer, about: &[u8], key: NodeId, signature: &Signature) -> bool {
        signature.verifies(key, &self.message(signer, about))
    }

    fn message(&self, signer: Signer, about: &[u8]) -> Vec<u8> {
        let domain: &[u8] = match signer {
            Signer::Issuer => b"grapevine join proof 1\0",
            Signer::Token => b"grapevine join token 1\0",
            Signer::Joiner => b"grapevine join claim 1\0",
        };
        [domain, &self.0, blake3::hash(about).as_bytes()].concat()
    }
}

/// In which part somebody signs a transcript.
#[derive(Clone, Copy)]
enum Signer {
    Issuer,
    Token,
    Joiner,
}

/// What a side of an exchange was waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    Hello,
    Proof,
    Claim,
    Grant,
    /// The use of a token to become durable, on this node.
    Redemption,
    Nothing,
}

impl std::fmt::Display for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Waiting::Hello => "its hello",
            Waiting::Proof => "its proof of belonging to the mesh",
            Waiting::Claim => "its token",
            Waiting::Grant => "the certificate",
            Waiting::Redemption => "the use of the token to be stored",
            Waiting::Nothing => "nothing",
        })
    }
}

/// Why the bytes of a peer do not belong to an exchange.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("frame of kind {kind} instead of {waiting}")]
    Unexpected { kind: u16, waiting: Waiting },
    #[error("a frame of kind {kind} cannot be decoded: {source}")]
    Malformed { kind: u16, source: DecodeError },
    #[error("{name} has {count} entries, at most {max} are allowed")]
    TooMany { name: &'static str, count: usize, max: usize },
}

#[cfg(test)]
mod tests;
