//! Membership certificates.

use std::fmt;

use bincode::{Decode, Encode};

use crate::{MeshId, NodeId};

use super::signed::{Signed, Statement};
use super::unix_time::{CLOCK_SKEW_S, UnixTime};

/// That a node belongs to a mesh, for a day.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Membership {
    pub mesh: MeshId,
    pub node: NodeId,
    pub roles: Roles,
    /// Random: tells two certificates of one node apart in logs.
    pub serial: u64,
    pub not_before: UnixTime,
    pub expires: UnixTime,
    /// The authority epoch in which it was issued.
    pub epoch: u64,
}

impl Statement for Membership {
    const DOMAIN: &'static str = "grapevine membership 1";
}

/// A membership signed by an authority. [`super::Trust`] issues and verifies it.
pub type Certificate = Signed<Membership>;

impl Membership {
    /// What holds at `now` whoever signed: the certificate is this mesh's, this node's, and in force.
    pub(super) fn check(
        &self,
        mesh: MeshId,
        holder: NodeId,
        now: UnixTime,
    ) -> Result<(), CertificateError> {
        if self.mesh != mesh {
            return Err(CertificateError::OtherMesh { theirs: self.mesh });
        }
        if self.node != holder {
            return Err(CertificateError::OtherNode { named: self.node, holder });
        }
        if self.expires <= self.not_before
            || self.expires.since(self.not_before) > LIFETIME_S + BACKDATE_S
        {
            return Err(CertificateError::Lifetime);
        }
        if now.plus(CLOCK_SKEW_S) < self.not_before {
            let ahead_s = self.not_before.since(now);
            return Err(CertificateError::NotYetValid { ahead_s });
        }
        if now > self.expires.plus(CLOCK_SKEW_S) {
            return Err(CertificateError::Expired { ago_s: now.since(self.expires) });
        }
        Ok(())
    }

    /// Whether it is time to renew: two thirds of its life are over, or the clock stands before it.
    pub fn is_due(&self, now: UnixTime) -> bool {
        now >= self.renew_at() || now < self.not_before
    }

    /// When two thirds of its life are over, counted from its issue.
    pub fn renew_at(&self) -> UnixTime {
        let issued = self.not_before.plus(BACKDATE_S);
        issued.plus(self.expires.since(issued) / 3 * 2)
    }
}

/// Why a certificate is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    #[error("the certificate is of mesh {}, another one", theirs.short())]
    OtherMesh { theirs: MeshId },
    #[error("the certificate is of node {}, shown by {}", named.short(), holder.short())]
    OtherNode { named: NodeId, holder: NodeId },
    #[error("the certificate claims to live longer than certificates do")]
    Lifetime,
    #[error(
        "the certificate begins {ahead_s} s in the future, more than the {CLOCK_SKEW_S} s that \
         clocks may differ: set the clock of one of the hosts"
    )]
    NotYetValid { ahead_s: u64 },
    #[error(
        "the certificate expired {ago_s} s ago ({CLOCK_SKEW_S} s of clock difference are forgiven)"
    )]
    Expired { ago_s: u64 },
    #[error("the certificate is forged: its signature does not fit")]
    Forged,
    #[error("node {} is revoked", node.short())]
    Revoked { node: NodeId },
    #[error("the certificate was issued by {}, which is revoked", issuer.short())]
    IssuerRevoked { issuer: NodeId },
    #[error(
        "the certificate was issued by {} in authority epoch {epoch}, where it has no authority",
        issuer.short()
    )]
    NoAuthority { issuer: NodeId, epoch: u64 },
    #[error(
        "the certificate was issued in authority epoch {theirs}; this node knows {ours} only and \
         must learn the newer ones first"
    )]
    EpochAhead { theirs: u64, ours: u64 },
    #[error("the mesh's authority expired {ago_s} s ago: start a node that has the root key")]
    AuthorityExpired { ago_s: u64 },
    #[error("node {} has not the role {role}", node.short())]
    Role { node: NodeId, role: Role },
}

/// What a node may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Serves models and holds KV blocks.
    Compute,
    /// Takes requests of clients into the mesh.
    Ingress,
    /// May be made an authority.
    Authority,
}

/// A set of roles. Bits that this node does not know are kept.
#[derive(Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Roles(u32);

impl Role {
    pub const ALL: [Role; 3] = [Role::Compute, Role::Ingress, Role::Authority];

    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Compute => "compute",
            Role::Ingress => "ingress",
            Role::Authority => "authority",
        }
    }

    const fn bit(self) -> u32 {
        match self {
            Role::Compute => 1,
            Role::Ingress => 2,
            Role::Authority => 4,
        }
    }
}

impl Roles {
    /// Every role of this version.
    pub const ALL: Roles = Roles(7);

    pub fn new(roles: &[Role]) -> Roles {
        Roles(roles.iter().fold(0, |bits, role| bits | role.bit()))
    }

    pub fn contains(self, role: Role) -> bool {
        self.0 & role.bit() != 0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Roles {
    /// As `compute,ingress`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = Role::ALL.into_iter().filter(|&r| self.contains(r)).map(Role::as_str);
        f.write_str(&known.collect::<Vec<_>>().join(","))
    }
}

impl fmt::Debug for Roles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Roles({self})")
    }
}

impl std::str::FromStr for Roles {
    type Err = RolesError;

    /// Reads `compute,ingress`; `all` is every role.
    fn from_str(text: &str) -> Result<Roles, RolesError> {
        if text == "all" {
            return Ok(Roles::ALL);
        }
        let role = |name: &str| {
            let known = Role::ALL.into_iter().find(|r| r.as_str() == name.trim());
            known.ok_or_else(|| RolesError(name.trim().to_owned()))
        };
        Ok(Roles::new(&text.split(',').map(role).collect::<Result<Vec<_>, _>>()?))
    }
}

/// A name that is no role.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no role: compute, ingress, authority, or all")]
pub struct RolesError(String);

/// Life of a certificate from its issue, in seconds: a day. Too small: members that cannot reach an
/// authority for that long drop out. Too large: without a revocation a lost host stays in for longer.
pub const LIFETIME_S: u64 = 86_400;

/// How long before its issue a certificate begins, in seconds, so that hosts whose clocks were set back
/// by an hour still accept it.
pub const BACKDATE_S: u64 = 3_600;

/// How long after its expiry a certificate is still good for renewal, and for nothing else, in seconds:
/// 30 days. Too small: hosts that were off on holidays need a token. Too large: whoever finds an old disk
/// gets in, unless it was revoked.
pub const RENEWAL_GRACE_S: u64 = 30 * 86_400;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_read_and_shown() {
        for (text, roles) in [
            ("compute", Ok(Roles(1))),
            ("ingress, compute", Ok(Roles(3))),
            ("all", Ok(Roles::ALL)),
            ("", Err(RolesError(String::new()))),
            ("compute,root", Err(RolesError("root".to_owned()))),
        ] {
            assert_eq!(text.parse::<Roles>(), roles, "{text:?}");
        }
        assert_eq!(Roles(0x83).to_string(), "compute,ingress");
    }
}
