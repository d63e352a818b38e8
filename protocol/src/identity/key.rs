//! Ed25519 keys (RFC 8032).

use std::fmt;

use bincode::{Decode, Encode};
use ed25519_dalek::{Signer, SigningKey, VerifyingKey};

use crate::{MeshId, NodeId};

/// A secret key: of a node, of a mesh's root, or of a token. Wiped from memory when dropped.
#[derive(Clone)]
pub struct NodeKey(SigningKey);

impl NodeKey {
    /// The key of 32 secret random bytes (the seed of RFC 8032).
    pub fn from_secret(secret: [u8; 32]) -> Self {
        NodeKey(SigningKey::from_bytes(&secret))
    }

    /// The secret bytes, for the file that keeps them.
    pub fn secret(&self) -> [u8; 32] {
        self.0.to_bytes()
    }

    /// The public half.
    pub fn id(&self) -> NodeId {
        NodeId(self.0.verifying_key().to_bytes())
    }

    /// The public half of a mesh's root key.
    pub fn root(&self) -> RootId {
        RootId(self.0.verifying_key().to_bytes())
    }

    /// Signs bytes. Callers go through [`super::Signed`] or add a domain of their own, so that what is
    /// signed for one purpose never means something else.
    pub fn sign(&self, bytes: &[u8]) -> Signature {
        Signature(self.0.sign(bytes).to_bytes())
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeKey({})", self.id().short())
    }
}

/// The public half of a mesh's root key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct RootId(pub [u8; 32]);

impl RootId {
    /// The mesh that this root makes.
    pub fn mesh(&self) -> MeshId {
        MeshId(*blake3::hash(&self.0).as_bytes())
    }

    /// The root as the signer of a statement.
    pub fn signer(&self) -> NodeId {
        NodeId(self.0)
    }
}

/// An Ed25519 signature.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub struct Signature(pub [u8; 64]);

impl Signature {
    /// Whether `signer` made this over `bytes`. Strict: keys of small order and second encodings of a
    /// signature are refused, so that a signature has one form and one meaning.
    pub fn verifies(&self, signer: NodeId, bytes: &[u8]) -> bool {
        let Ok(key) = VerifyingKey::from_bytes(&signer.0) else { return false };
        key.verify_strict(bytes, &ed25519_dalek::Signature::from_bytes(&self.0)).is_ok()
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "Signature({a:02x}{b:02x}{c:02x}{d:02x}…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 8032, section 7.1, tests 1 and 2.
    #[test]
    fn rfc_8032() {
        let hex = |text: &str| data_encoding::HEXLOWER.decode(text.as_bytes()).unwrap();
        for (secret, public, message, signature) in [
            (
                "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
                "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
                "",
                "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155\
                 5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
            ),
            (
                "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
                "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
                "72",
                "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da\
                 085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
            ),
        ] {
            let key = NodeKey::from_secret(hex(secret).try_into().unwrap());
            assert_eq!(key.id().0.to_vec(), hex(public));
            let made = key.sign(&hex(message));
            assert_eq!(made.0.to_vec(), hex(signature));
            assert!(made.verifies(key.id(), &hex(message)));
            assert!(!made.verifies(key.id(), b"other"));
        }
    }

    #[test]
    fn weak_keys_verify_nothing() {
        let key = NodeKey::from_secret([1; 32]);
        let signature = key.sign(b"x");
        // The neutral element and a point that is none.
        let mut neutral = [0; 32];
        neutral[0] = 1;
        for id in [neutral, [0xff; 32], [0; 32]] {
            assert!(!signature.verifies(NodeId(id), b"x"));
        }
    }
}
