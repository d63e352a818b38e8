//! Who belongs to a mesh, and who may say so.
//!
//! - [`NodeKey`]: the Ed25519 key of a node; its public half is the `NodeId`.
//! - [`AuthorityChain`]: the sets of nodes that may issue certificates, from the mesh's root key to the
//!   present one; `MeshId` is the hash of the root (docs/adr/0010-authority.md).
//! - [`Certificate`]: a node's membership, 24 hours long, signed by an authority.
//! - [`Revocation`]: ends a membership at once.
//! - [`Trust`]: all of this as one node knows it; it verifies, issues and merges.
//! - [`Invite`]: a join token; [`Ledger`] counts its uses.
//! - [`join`]: the exchange that turns a token, or an expired certificate, into a certificate.
//! - [`greeting`]: what two members say first on a connection.
//!
//! Owns what is true about identity. Refuses IO, clocks and randomness: wall-clock time is a
//! [`UnixTime`] argument, random bytes are arguments too. Every collection has a named bound, and
//! everything that a peer sent is an error at worst.

mod attempts;
mod authority;
mod certificate;
pub mod greeting;
mod invite;
pub mod join;
mod key;
mod ledger;
mod revocation;
mod signed;
#[cfg(test)]
mod testing;
mod trust;
mod unix_time;

pub use attempts::{Attempts, AttemptsConfig};
pub use authority::{
    AUTHORITIES_DEFAULT, AUTHORITIES_MAX, AUTHORITY_LIFETIME_S, AuthorityChain, AuthorityError,
    AuthoritySet, CHAIN_LINKS_MAX, SetHash, SignedSet,
};
pub use certificate::{
    BACKDATE_S, Certificate, CertificateError, LIFETIME_S, Membership, RENEWAL_GRACE_S, Role,
    Roles, RolesError,
};
pub use invite::{
    INVITE_SEEDS_MAX, INVITE_USES_MAX, Invite, InviteError, InviteId, InviteRecord, SignedRecord,
};
pub use key::{NodeKey, RootId, Signature};
pub use ledger::{INVITES_MAX, InviteUse, Ledger, RedeemError, Redemption};
pub use revocation::{
    REVOCATION_KEEP_S, REVOCATIONS_MAX, Revocation, RevocationError, Revocations, SignedRevocation,
};
pub use signed::{Forged, Signed, Statement};
pub use trust::{ChangeError, Trust, TrustError};
pub use unix_time::{CLOCK_SKEW_S, UnixTime};
