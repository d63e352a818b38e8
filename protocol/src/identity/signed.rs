//! Statements that somebody signed.

use bincode::{Decode, Encode};

use crate::NodeId;
use crate::wire;

use super::key::{NodeKey, Signature};

/// Something that is worth a signature.
pub trait Statement: Encode {
    /// Signed before the bytes of the statement, so that no statement can pass for another kind.
    /// Ends with the version of the statement's layout.
    const DOMAIN: &'static str;
}

/// A statement with its signer. Decoding one proves nothing; [`Signed::verify`] does.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Signed<T> {
    /// What is said. Not to be trusted before `verify`.
    pub body: T,
    /// The public key that signed: of a node, or of the mesh's root.
    pub signer: NodeId,
    pub signature: Signature,
}

impl<T: Statement> Signed<T> {
    pub fn new(body: T, key: &NodeKey) -> Self {
        let signer = key.id();
        let signature = key.sign(&message(&body, signer));
        Signed { body, signer, signature }
    }

    /// Checks that `signer` signed exactly this. Says nothing about whether the signer may say so.
    pub fn verify(&self) -> Result<&T, Forged> {
        match self.signature.verifies(self.signer, &message(&self.body, self.signer)) {
            true => Ok(&self.body),
            false => Err(Forged),
        }
    }
}

/// A signature that does not fit: the statement was changed, or never signed by that key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the signature does not fit")]
pub struct Forged;

/// What is signed: domain, NUL, signer, and the one encoding of the statement. The statement is encoded
/// anew, so that a second encoding of the same value on the wire changes nothing.
fn message<T: Statement>(body: &T, signer: NodeId) -> Vec<u8> {
    let mut message = Vec::from(T::DOMAIN);
    message.push(0);
    message.extend_from_slice(&signer.0);
    message.extend_from_slice(&wire::encode(body));
    message
}
