//! Revocations: events that end a membership before its certificate expires.

use std::collections::BTreeMap;

use bincode::{Decode, Encode};

use crate::wire;
use crate::{MeshId, NodeId};

use super::certificate::{LIFETIME_S, RENEWAL_GRACE_S};
use super::key::NodeKey;
use super::signed::{Signed, Statement};
use super::unix_time::UnixTime;

/// That a node is out of the mesh, or in again. The highest epoch of a node counts; at the same epoch
/// being revoked does.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Revocation {
    pub mesh: MeshId,
    pub node: NodeId,
    /// Rises with each event about this node.
    pub epoch: u64,
    /// `false` takes an earlier revocation back.
    pub revoked: bool,
    pub issued_at: UnixTime,
}

impl Statement for Revocation {
    const DOMAIN: &'static str = "grapevine revocation 1";
}

pub type SignedRevocation = Signed<Revocation>;

/// The newest event of each node. All of them were signed by an authority when they were taken in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revocations {
    by_node: BTreeMap<NodeId, SignedRevocation>,
}

impl Revocations {
    pub fn is_revoked(&self, node: NodeId) -> bool {
        self.by_node.get(&node).is_some_and(|event| event.body.revoked)
    }

    pub fn iter(&self) -> impl Iterator<Item = &SignedRevocation> {
        self.by_node.values()
    }

    pub fn len(&self) -> usize {
        self.by_node.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_node.is_empty()
    }

    /// The same on two nodes that know the same, whoever signed.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("grapevine revocations digest 1");
        for event in self.by_node.values() {
            hasher.update(&wire::encode(&(event.body.node, event.body.epoch, event.body.revoked)));
        }
        *hasher.finalize().as_bytes()
    }

    /// The next event about `node`, not yet taken in.
    pub(super) fn next(
        &self,
        mesh: MeshId,
        node: NodeId,
        revoked: bool,
        now: UnixTime,
    ) -> Revocation {
        let epoch = self.by_node.get(&node).map_or(1, |event| event.body.epoch.saturating_add(1));
        Revocation { mesh, node, epoch, revoked, issued_at: now }
    }

    /// Whether this event says something new.
    pub(super) fn is_news(&self, event: &Revocation) -> bool {
        let order = |e: &Revocation| (e.epoch, e.revoked);
        self.by_node.get(&event.node).is_none_or(|known| order(event) > order(&known.body))
    }

    /// Takes in an event whose signature and authority have been checked.
    pub(super) fn insert(
        &mut self,
        event: SignedRevocation,
        now: UnixTime,
    ) -> Result<(), RevocationError> {
        if !self.by_node.contains_key(&event.body.node) && self.by_node.len() >= REVOCATIONS_MAX {
            self.prune(now);
            if self.by_node.len() >= REVOCATIONS_MAX {
                return Err(RevocationError::Full);
            }
        }
        self.by_node.insert(event.body.node, event);
        Ok(())
    }

    /// Forgets events that no certificate can outlive any more. Only at the bound: an event that is
    /// forgotten early by some would be told to them again by the others.
    fn prune(&mut self, now: UnixTime) {
        self.by_node.retain(|_, event| now <= event.body.issued_at.plus(REVOCATION_KEEP_S));
    }

    /// Signs anew what `lost` signed, so that newcomers who know only the present authorities believe
    /// it.
    pub(super) fn adopt(&mut self, key: &NodeKey, is_lost: impl Fn(NodeId) -> bool) -> usize {
        let mut adopted = 0;
        for event in self.by_node.values_mut().filter(|event| is_lost(event.signer)) {
            *event = Signed::new(event.body.clone(), key);
            adopted += 1;
        }
        adopted
    }
}

/// Why a revocation is refused. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RevocationError {
    #[error("the revocation is of mesh {}, another one", theirs.short())]
    OtherMesh { theirs: MeshId },
    #[error("the revocation of {} is forged: its signature does not fit", node.short())]
    Forged { node: NodeId },
    #[error(
        "{REVOCATIONS_MAX} nodes are revoked within a month, more are not kept: found a new mesh"
    )]
    Full,
    #[error("{events} revocations at once, more than {REVOCATIONS_MAX}")]
    TooMany { events: usize },
}

/// Events kept, one for each node, each of at most 200 bytes.
pub const REVOCATIONS_MAX: usize = 512;

/// How long an event must be kept, in seconds: until no certificate from before it can be renewed.
pub const REVOCATION_KEEP_S: u64 = LIFETIME_S + RENEWAL_GRACE_S + 4 * 86_400;
