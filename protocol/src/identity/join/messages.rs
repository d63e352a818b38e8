//! The messages of the join exchange and their bounds.

use core::net::SocketAddr;

use bincode::{Decode, Encode};

use crate::NodeId;
use crate::frame::{Frame, Kind};
use crate::wire::DecodeError;

use super::super::authority::SignedSet;
use super::super::certificate::{Certificate, CertificateError};
use super::super::invite::{InviteError, SignedRecord};
use super::super::key::{RootId, Signature};
use super::super::ledger::RedeemError;
use super::super::revocation::SignedRevocation;
use super::super::unix_time::UnixTime;
use super::Violation;

/// The joiner's first words. The version of the exchange is the frame's.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct JoinHello {
    /// Random.
    pub nonce: [u8; 32],
}

/// That the node which answers belongs to the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct JoinProof {
    pub root: RootId,
    pub links: Vec<SignedSet>,
    pub revocations: Vec<SignedRevocation>,
    /// Of the node that answers.
    pub certificate: Certificate,
    /// Random.
    pub nonce: [u8; 32],
    /// By that node, over the transcript.
    pub signature: Signature,
}

/// What the joiner brings.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct JoinClaim {
    pub claim: Claim,
    /// By the joiner, over the transcript and the claim.
    pub signature: Signature,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Claim {
    /// A token. The signature is by its secret half, over the transcript and the record.
    Invite { record: SignedRecord, signature: Signature },
    /// A certificate to be renewed.
    Renewal { certificate: Certificate },
}

/// Success.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct JoinGrant {
    pub certificate: Certificate,
    /// Members to begin with, at most [`CONTACTS_MAX`].
    pub peers: Vec<Contact>,
}

/// Who can decide about this claim, the best first; at most [`CONTACTS_MAX`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct JoinElsewhere {
    pub authorities: Vec<Contact>,
}

/// A node and where it listens, at most [`CONTACT_ADDRESSES_MAX`] addresses.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Contact {
    pub node: NodeId,
    pub addresses: Vec<SocketAddr>,
}

/// Why a node is not let in, or a certificate is not accepted, as told to the other side. Its text is
/// shown to people, so it consists of words of ours only.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, thiserror::Error)]
pub enum Refusal {
    #[error("the token or certificate is for another mesh")]
    OtherMesh,
    #[error("the token expired at {at}: make a new one with `vine invite`")]
    TokenExpired { at: UnixTime },
    #[error("the token has been used (it was for {uses}): make a new one with `vine invite`")]
    TokenUsed { uses: u16 },
    #[error("the token's secret is wrong")]
    TokenSecret,
    #[error("the token was made by a node that is revoked or has no authority: make a new one")]
    TokenIssuer,
    #[error("a signature does not fit")]
    Forged,
    #[error("this node has been revoked: an authority can take that back")]
    Revoked,
    #[error("the certificate expired {ago_s} s ago: join again with a token")]
    CertificateExpired { ago_s: u64 },
    #[error("the certificate begins {ahead_s} s in the future: set the clocks of the hosts")]
    CertificateAhead { ahead_s: u64 },
    #[error("the certificate was issued by a node that is revoked or has no authority")]
    CertificateIssuer,
    #[error("the node that was asked cannot issue certificates at present")]
    NoAuthority,
    #[error("too many attempts: wait {retry_s} s")]
    Busy { retry_s: u64 },
    #[error("what was sent is not the protocol that this node speaks")]
    Protocol,
}

impl Refusal {
    /// Whether trying again later can help, without anything new from people.
    pub fn is_passing(&self) -> bool {
        matches!(self, Refusal::Busy { .. } | Refusal::NoAuthority)
    }
}

impl From<&InviteError> for Refusal {
    fn from(error: &InviteError) -> Self {
        match error {
            InviteError::OtherMesh { .. } => Refusal::OtherMesh,
            InviteError::Expired { at } => Refusal::TokenExpired { at: *at },
            InviteError::IssuerRevoked { .. } | InviteError::NoAuthority { .. } => {
                Refusal::TokenIssuer
            }
            InviteError::Forged => Refusal::Forged,
            InviteError::NotAToken
            | InviteError::OtherVersion
            | InviteError::Mistyped
            | InviteError::Uses { .. }
            | InviteError::Seeds { .. } => Refusal::Protocol,
        }
    }
}

impl From<&CertificateError> for Refusal {
    fn from(error: &CertificateError) -> Self {
        match error {
            CertificateError::OtherMesh { .. } => Refusal::OtherMesh,
            CertificateError::NotYetValid { ahead_s } => {
                Refusal::CertificateAhead { ahead_s: *ahead_s }
            }
            CertificateError::Expired { ago_s } => Refusal::CertificateExpired { ago_s: *ago_s },
            CertificateError::Forged | CertificateError::OtherNode { .. } => Refusal::Forged,
            CertificateError::Revoked { .. } => Refusal::Revoked,
            CertificateError::IssuerRevoked { .. }
            | CertificateError::NoAuthority { .. }
            | CertificateError::EpochAhead { .. } => Refusal::CertificateIssuer,
            CertificateError::AuthorityExpired { .. } => Refusal::NoAuthority,
            CertificateError::Lifetime | CertificateError::Role { .. } => Refusal::Protocol,
        }
    }
}

impl From<&RedeemError> for Refusal {
    fn from(error: &RedeemError) -> Self {
        match error {
            RedeemError::UsedUp { uses } => Refusal::TokenUsed { uses: *uses },
            RedeemError::Full => Refusal::Busy { retry_s: 60 },
        }
    }
}

/// Decodes the body of a frame of `kind`.
pub(in super::super) fn value<T: Decode<()>>(frame: &Frame) -> Result<T, Violation> {
    frame
        .value::<T, JOIN_FRAME_BYTES_MAX>()
        .map_err(|source| Violation::Malformed { kind: frame.kind.0, source })
}

/// Refuses contacts beyond the bounds.
pub(super) fn check_contacts(contacts: &[Contact]) -> Result<(), Violation> {
    let too_many = |name, count, max| match count > max {
        true => Err(Violation::TooMany { name, count, max }),
        false => Ok(()),
    };
    too_many("contacts", contacts.len(), CONTACTS_MAX)?;
    contacts
        .iter()
        .try_for_each(|c| too_many("addresses", c.addresses.len(), CONTACT_ADDRESSES_MAX))
}

/// Decodes a frame of the join exchange or of a greeting, whichever it is: for fuzzers.
///
/// # Errors
/// As the exchange would see it; unknown kinds are none.
pub fn decode_any(frame: &Frame) -> Result<(), DecodeError> {
    const LIMIT: usize = JOIN_FRAME_BYTES_MAX;
    match frame.kind {
        Kind::JOIN_HELLO => frame.value::<JoinHello, LIMIT>().map(drop),
        Kind::JOIN_PROOF => frame.value::<JoinProof, LIMIT>().map(drop),
        Kind::JOIN_CLAIM => frame.value::<JoinClaim, LIMIT>().map(drop),
        Kind::JOIN_GRANT => frame.value::<JoinGrant, LIMIT>().map(drop),
        Kind::JOIN_REFUSAL => frame.value::<Refusal, LIMIT>().map(drop),
        Kind::JOIN_ELSEWHERE => frame.value::<JoinElsewhere, LIMIT>().map(drop),
        _ => super::super::greeting::decode_any(frame),
    }
}

/// Longest frame of an exchange: a full chain and all revocations fit.
pub const JOIN_FRAME_BYTES_MAX: usize = 256 << 10;

/// Nodes told of at once.
pub const CONTACTS_MAX: usize = 32;

/// Addresses of one node.
pub const CONTACT_ADDRESSES_MAX: usize = 8;
