//! Who may issue certificates: a chain of sets of nodes (docs/adr/0010-authority.md).
//!
//! The root signs the first set. Each further set has the next epoch, names the set before it by hash,
//! and is signed by one member of that set or by the root. So authority passes on for as long as one
//! authority lives, without the root and without the founder.
//!
//! Two sets of one epoch are a fork. It is decided the same way everywhere: the root's word wins; a
//! signer whom this node's newest set no longer contains is not heard, so that who was removed cannot
//! write itself back; then the higher epoch wins, then the smaller hash.

use std::fmt;

use bincode::{Decode, Encode};

use crate::wire;
use crate::{MeshId, NodeId};

use super::key::{NodeKey, RootId};
use super::signed::{Signed, Statement};
use super::unix_time::{CLOCK_SKEW_S, UnixTime};

/// The nodes that may issue certificates, from one epoch on.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AuthoritySet {
    pub mesh: MeshId,
    /// Rises by one with each set.
    pub epoch: u64,
    /// The set before; zeros for the first.
    pub previous: SetHash,
    /// At least one and at most [`AUTHORITIES_MAX`], sorted, without repetition.
    pub members: Vec<NodeId>,
    pub issued_at: UnixTime,
    /// After this the set issues nothing and nothing that it issued is accepted. Any authority renews it
    /// by a next set in the last third of its life.
    pub expires: UnixTime,
}

/// The hash of a set with its signer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct SetHash(pub [u8; 32]);

impl fmt::Debug for SetHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "SetHash({a:02x}{b:02x}{c:02x}{d:02x}…)")
    }
}

impl Statement for AuthoritySet {
    const DOMAIN: &'static str = "grapevine authority set 1";
}

/// One link of the chain.
pub type SignedSet = Signed<AuthoritySet>;

impl SignedSet {
    /// Names this set in the next one, in tokens and in greetings.
    pub fn hash(&self) -> SetHash {
        let mut hasher = blake3::Hasher::new_derive_key("grapevine authority set hash 1");
        hasher.update(&self.signer.0);
        hasher.update(&wire::encode(&self.body));
        SetHash(*hasher.finalize().as_bytes())
    }
}

/// All sets from the root to the present one, checked. The first is signed by the root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorityChain {
    root: RootId,
    links: Vec<SignedSet>,
}

impl AuthorityChain {
    /// The first chain of a mesh: the root makes `founder` its only authority.
    pub fn found(root: &NodeKey, founder: NodeId, now: UnixTime) -> Self {
        let body = AuthoritySet {
            mesh: root.root().mesh(),
            epoch: 1,
            previous: SetHash([0; 32]),
            members: vec![founder],
            issued_at: now,
            expires: now.plus(AUTHORITY_LIFETIME_S),
        };
        AuthorityChain { root: root.root(), links: vec![Signed::new(body, root)] }
    }

    /// Checks links that came from a peer or from the disk.
    ///
    /// # Errors
    /// Says which link is wrong and why. Costs at most [`CHAIN_LINKS_MAX`] signature checks.
    pub fn verify(root: RootId, links: Vec<SignedSet>) -> Result<Self, AuthorityError> {
        if links.is_empty() || links.len() > CHAIN_LINKS_MAX {
            return Err(AuthorityError::Links { links: links.len() });
        }
        for (i, link) in links.iter().enumerate() {
            check_set(root, link)?;
            let epoch = link.body.epoch;
            let by_root = link.signer == root.signer();
            match i.checked_sub(1).map(|before| &links[before]) {
                None if !by_root => return Err(AuthorityError::NotFromRoot),
                None => {}
                Some(before) => {
                    if epoch != before.body.epoch.saturating_add(1) {
                        return Err(AuthorityError::Gap { epoch });
                    }
                    if link.body.previous != before.hash() {
                        return Err(AuthorityError::Unlinked { epoch });
                    }
                    if !by_root && !before.body.members.contains(&link.signer) {
                        return Err(AuthorityError::Signer { epoch, signer: link.signer });
                    }
                }
            }
            // The dearest check last.
            link.verify().map_err(|_| AuthorityError::Forged { epoch })?;
        }
        Ok(AuthorityChain { root, links })
    }

    pub fn root(&self) -> RootId {
        self.root
    }

    pub fn mesh(&self) -> MeshId {
        self.root.mesh()
    }

    pub fn links(&self) -> &[SignedSet] {
        &self.links
    }

    /// The present set.
    pub fn head(&self) -> &SignedSet {
        self.links.last().expect("a chain has a link")
    }

    pub fn epoch(&self) -> u64 {
        self.head().body.epoch
    }

    /// Whether `node` is an authority at present.
    pub fn contains(&self, node: NodeId) -> bool {
        self.head().body.members.contains(&node)
    }

    /// The set of that epoch, if the chain reaches back to it.
    pub fn at(&self, epoch: u64) -> Option<&SignedSet> {
        let first = self.links.first()?.body.epoch;
        self.links.get(usize::try_from(epoch.checked_sub(first)?).ok()?)
    }

    /// When `node`, an authority at `epoch`, ceased to be one; `None` if it still is.
    pub fn removed_at(&self, node: NodeId, epoch: u64) -> Option<UnixTime> {
        let later = self.links.iter().filter(|l| l.body.epoch > epoch);
        later.filter(|l| !l.body.members.contains(&node)).map(|l| l.body.issued_at).next()
    }

    /// Appends a set of `members`, signed by `key`, which is a present authority or the root.
    ///
    /// # Errors
    /// If `key` may not, or `members` are none or too many, or the chain is full and `key` is not the
    /// root (a set of the root starts the chain anew, so that it never fills up while the root is kept).
    /// Nothing has changed then.
    pub fn append(
        &mut self,
        key: &NodeKey,
        mut members: Vec<NodeId>,
        now: UnixTime,
    ) -> Result<(), AuthorityError> {
        members.sort_unstable();
        members.dedup();
        let by_root = key.root() == self.root;
        let epoch = self.epoch() + 1;
        if !by_root && !self.contains(key.id()) {
            return Err(AuthorityError::Signer { epoch, signer: key.id() });
        }
        if members.is_empty() || members.len() > AUTHORITIES_MAX {
            return Err(AuthorityError::Members { epoch, members: members.len() });
        }
        if !by_root && self.links.len() >= CHAIN_LINKS_MAX {
            return Err(AuthorityError::Links { links: self.links.len() + 1 });
        }
        let body = AuthoritySet {
            mesh: self.mesh(),
            epoch,
            previous: self.head().hash(),
            members,
            issued_at: now,
            expires: now.plus(AUTHORITY_LIFETIME_S),
        };
        if by_root && self.links.len() >= CHAIN_LINKS_MAX / 2 {
            self.links.clear();
        }
        self.links.push(Signed::new(body, key));
        Ok(())
    }

    /// Takes `other` over if it goes on from this chain or wins a fork; says whether it did.
    ///
    /// # Errors
    /// If `other` is of another root, or forks off through a signer that is not heard here. Nothing has
    /// changed then, and nothing changes if `other` is older.
    pub fn merge(
        &mut self,
        other: AuthorityChain,
        is_heard: impl Fn(NodeId) -> bool,
    ) -> Result<bool, AuthorityError> {
        if other.root != self.root {
            return Err(AuthorityError::OtherMesh { theirs: other.mesh() });
        }
        if other.head().hash() == self.head().hash() {
            return Ok(false);
        }
        let wins = match self.first_difference(&other) {
            Difference::Behind => false,
            Difference::Ahead { from } => {
                let unheard = other.links[from..]
                    .iter()
                    .find(|l| l.signer != self.root.signer() && !is_heard(l.signer));
                if let Some(link) = unheard {
                    return Err(unheard_signer(link));
                }
                true
            }
            Difference::Fork { ours, theirs } => {
                let root = self.root.signer();
                match (ours.signer == root, theirs.signer == root) {
                    (true, false) => false,
                    (false, true) => true,
                    (false, false) if !self.contains(theirs.signer) || !is_heard(theirs.signer) => {
                        return Err(unheard_signer(theirs));
                    }
                    _ => fork_order(other.head()) > fork_order(self.head()),
                }
            }
        };
        if wins {
            *self = other;
        }
        Ok(wins)
    }

    /// Whether the present set should be renewed: the last third of its life has begun.
    pub fn is_due(&self, now: UnixTime) -> bool {
        let head = &self.head().body;
        now >= head.expires.minus(head.expires.since(head.issued_at) / 3)
    }

    fn first_difference<'a>(&'a self, other: &'a AuthorityChain) -> Difference<'a> {
        for (i, theirs) in other.links.iter().enumerate() {
            match self.at(theirs.body.epoch) {
                Some(ours) if ours.hash() == theirs.hash() => {}
                Some(ours) => return Difference::Fork { ours, theirs },
                // Before our first link, which the root signed: theirs is older there.
                None if theirs.body.epoch <= self.epoch() => {}
                None => return Difference::Ahead { from: i },
            }
        }
        Difference::Behind
    }
}

/// How another chain stands to ours.
enum Difference<'a> {
    /// All of it is in ours, or older.
    Behind,
    /// It goes on where ours ends: its links from that index are new.
    Ahead { from: usize },
    /// The first two sets of one epoch that are not the same.
    Fork { ours: &'a SignedSet, theirs: &'a SignedSet },
}

/// What decides a fork that both sides may make: the greater wins.
fn fork_order(head: &SignedSet) -> (u64, std::cmp::Reverse<SetHash>) {
    (head.body.epoch, std::cmp::Reverse(head.hash()))
}

fn unheard_signer(link: &SignedSet) -> AuthorityError {
    AuthorityError::Signer { epoch: link.body.epoch, signer: link.signer }
}

/// What can be said of a set alone.
fn check_set(root: RootId, link: &SignedSet) -> Result<(), AuthorityError> {
    let AuthoritySet { mesh, epoch, members, issued_at, expires, .. } = &link.body;
    let epoch = *epoch;
    if *mesh != root.mesh() {
        return Err(AuthorityError::OtherMesh { theirs: *mesh });
    }
    if members.is_empty() || members.len() > AUTHORITIES_MAX {
        return Err(AuthorityError::Members { epoch, members: members.len() });
    }
    if !members.is_sorted_by(|a, b| a < b) {
        return Err(AuthorityError::Order { epoch });
    }
    if epoch == 0 || epoch > EPOCH_MAX {
        return Err(AuthorityError::Gap { epoch });
    }
    if expires <= issued_at || expires.since(*issued_at) > AUTHORITY_LIFETIME_S + CLOCK_SKEW_S {
        return Err(AuthorityError::Lifetime { epoch });
    }
    Ok(())
}

/// Why a chain, or a change of it, is refused. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    #[error("the authority chain is of mesh {}, another one", theirs.short())]
    OtherMesh { theirs: MeshId },
    #[error(
        "an authority chain of {links} sets: 1 to {CHAIN_LINKS_MAX} are allowed; at the limit only \
         the root key can change the authorities"
    )]
    Links { links: usize },
    #[error("the first authority set is not signed by the mesh's root")]
    NotFromRoot,
    #[error("authority epoch {epoch} does not follow the one before")]
    Gap { epoch: u64 },
    #[error("the authority set of epoch {epoch} names another predecessor")]
    Unlinked { epoch: u64 },
    #[error(
        "the authority set of epoch {epoch} is signed by {}, which has no authority for it",
        signer.short()
    )]
    Signer { epoch: u64, signer: NodeId },
    #[error("the signature of the authority set of epoch {epoch} does not fit")]
    Forged { epoch: u64 },
    #[error("{members} authorities in epoch {epoch}: 1 to {AUTHORITIES_MAX} are allowed")]
    Members { epoch: u64, members: usize },
    #[error("the authorities of epoch {epoch} are not sorted or repeat")]
    Order { epoch: u64 },
    #[error("the authority set of epoch {epoch} does not live for 0 to {AUTHORITY_LIFETIME_S} s")]
    Lifetime { epoch: u64 },
}

/// Authorities that a mesh gives itself, from its first members on. Too small: the loss of a host stops
/// joins. Too large: more hosts whose theft is the theft of the mesh.
pub const AUTHORITIES_DEFAULT: usize = 3;

/// Most authorities at once.
pub const AUTHORITIES_MAX: usize = 9;

/// Sets in a chain, each of at most 500 bytes. At the bound only the root can change the set, which
/// starts the chain anew. One change a month fills it in ten years.
pub const CHAIN_LINKS_MAX: usize = 128;

/// Life of an authority set in seconds: a year. Too small: a mesh that was switched off for long needs
/// its root key. Too large: a host that slept for long believes authorities that are gone.
pub const AUTHORITY_LIFETIME_S: u64 = 365 * 86_400;

/// So that the next epoch always exists.
const EPOCH_MAX: u64 = 1 << 48;

#[cfg(test)]
mod tests {
    use super::super::testing::{NOW, key};
    use super::*;

    fn ids(numbers: &[u8]) -> Vec<NodeId> {
        let mut ids: Vec<NodeId> = numbers.iter().map(|&n| key(n).id()).collect();
        ids.sort();
        ids
    }

    /// A chain by (signer, members): the root is 0.
    fn chain(steps: &[(u8, &[u8])]) -> AuthorityChain {
        let mut chain = AuthorityChain::found(&key(0), key(1).id(), NOW);
        for (signer, members) in steps {
            chain.append(&key(*signer), ids(members), NOW).unwrap();
        }
        chain
    }

    #[test]
    fn authority_passes_on_without_the_founder() {
        let mut made = chain(&[(1, &[1, 2, 3]), (2, &[2, 3]), (3, &[2, 3, 4])]);
        let read = AuthorityChain::verify(made.root(), made.links().to_vec()).unwrap();
        assert_eq!(read, made);
        assert_eq!((read.epoch(), read.contains(key(1).id())), (4, false));
        assert_eq!(read.removed_at(key(1).id(), 2), Some(NOW));
        assert_eq!(read.removed_at(key(2).id(), 2), None);
        assert_eq!(
            made.append(&key(1), ids(&[1]), NOW),
            Err(AuthorityError::Signer { epoch: 5, signer: key(1).id() })
        );
        let none = made.append(&key(2), vec![], NOW);
        assert_eq!(none, Err(AuthorityError::Members { epoch: 5, members: 0 }));
        let many = made.append(&key(2), ids(&[2, 3, 4, 5, 6, 7, 8, 9, 10, 11]), NOW);
        assert_eq!(many, Err(AuthorityError::Members { epoch: 5, members: 10 }));
        assert_eq!(made, read);
    }

    #[test]
    fn each_tampered_link_is_named() {
        type Change = fn(&mut Vec<SignedSet>);
        let good = chain(&[(1, &[1, 2]), (2, &[2])]);
        let signer = AuthorityError::Signer { epoch: 2, signer: key(4).id() };
        let cases: [(Change, AuthorityError); 12] = [
            (|l| l.clear(), AuthorityError::Links { links: 0 }),
            (|l| drop(l.remove(0)), AuthorityError::NotFromRoot),
            (|l| drop(l.remove(1)), AuthorityError::Gap { epoch: 3 }),
            (|l| l[1].signer = key(4).id(), signer),
            (|l| l[1].signature.0[5] ^= 1, AuthorityError::Forged { epoch: 2 }),
            (|l| l[2].body.previous.0[0] ^= 1, AuthorityError::Unlinked { epoch: 3 }),
            (|l| l[2].body.members = ids(&[2, 4]), AuthorityError::Forged { epoch: 3 }),
            (|l| l[2].body.issued_at.0 += 1, AuthorityError::Forged { epoch: 3 }),
            (|l| l[2].body.expires.0 += 301, AuthorityError::Lifetime { epoch: 3 }),
            (|l| l[1].body.members.reverse(), AuthorityError::Order { epoch: 2 }),
            (|l| l[0].body.epoch = 0, AuthorityError::Gap { epoch: 0 }),
            (
                |l| l[0].body.mesh = key(9).root().mesh(),
                AuthorityError::OtherMesh { theirs: key(9).root().mesh() },
            ),
        ];
        for (change, error) in cases {
            let mut links = good.links().to_vec();
            change(&mut links);
            assert_eq!(AuthorityChain::verify(good.root(), links), Err(error));
        }
    }

    /// Whatever the order in which nodes hear of both sides, they end with the same chain.
    #[test]
    fn forks_end_the_same_everywhere() {
        let a = chain(&[(1, &[1, 2]), (1, &[1, 2, 3])]);
        let b = chain(&[(1, &[1, 2]), (2, &[1, 2, 4])]);
        let longer = chain(&[(1, &[1, 2]), (2, &[1, 2, 4]), (2, &[1, 2, 4, 5])]);
        let root = chain(&[(1, &[1, 2]), (0, &[1, 5])]);
        for (x, y, wins) in
            [(&a, &b, None), (&a, &longer, Some(&longer)), (&longer, &root, Some(&root))]
        {
            let (mut left, mut right) = (x.clone(), y.clone());
            let took = (left.merge(y.clone(), |_| true), right.merge(x.clone(), |_| true));
            assert_eq!(left, right);
            assert_ne!(took.0, took.1, "one of the two changes its mind");
            if let Some(wins) = wins {
                assert_eq!(&left, wins);
            }
        }
    }

    #[test]
    fn who_was_removed_cannot_write_itself_back() {
        let before: [(u8, &[u8]); 1] = [(1, &[1, 2, 3])];
        let mut honest = chain(&[before[0], (1, &[1, 2])]);
        let rogue = chain(&[before[0], (3, &[3]), (3, &[3, 4]), (3, &[3, 4, 5])]);
        let refused = honest.merge(rogue.clone(), |_| true);
        assert_eq!(refused, Err(AuthorityError::Signer { epoch: 3, signer: key(3).id() }));
        // The rogue's side is equally sure of itself, until the root speaks.
        let spoken = chain(&[before[0], (0, &[1, 2])]);
        for mut side in [honest, rogue] {
            assert_eq!(side.merge(spoken.clone(), |_| true), Ok(true));
            assert_eq!(side, spoken);
        }
    }

    #[test]
    fn going_on_needs_heard_signers() {
        let mut old = chain(&[(1, &[1, 2])]);
        let new = chain(&[(1, &[1, 2]), (2, &[2]), (2, &[2, 3])]);
        let revoked = key(2).id();
        let refused = old.merge(new.clone(), |n| n != revoked);
        assert_eq!(refused, Err(AuthorityError::Signer { epoch: 3, signer: revoked }));
        assert_eq!(old.merge(new.clone(), |_| true), Ok(true));
        assert_eq!(old.merge(chain(&[(1, &[1, 2])]), |_| true), Ok(false));
        let other = AuthorityChain::found(&key(7), key(1).id(), NOW);
        assert_eq!(
            old.merge(other, |_| true),
            Err(AuthorityError::OtherMesh { theirs: key(7).root().mesh() })
        );
        assert_eq!(old, new);
    }

    #[test]
    fn a_full_chain_starts_anew_with_the_root() {
        let mut full = chain(&[]);
        while full.links().len() < CHAIN_LINKS_MAX {
            full.append(&key(1), ids(&[1]), NOW).unwrap();
        }
        let more = full.append(&key(1), ids(&[1, 2]), NOW);
        assert_eq!(more, Err(AuthorityError::Links { links: CHAIN_LINKS_MAX + 1 }));
        let old = full.clone();
        full.append(&key(0), ids(&[1, 2]), NOW).unwrap();
        assert_eq!((full.links().len(), full.epoch()), (1, CHAIN_LINKS_MAX as u64 + 1));
        assert!(AuthorityChain::verify(full.root(), full.links().to_vec()).is_ok());
        let mut behind = old.clone();
        assert_eq!(behind.merge(full.clone(), |_| true), Ok(true));
        assert_eq!(full.merge(old, |_| true), Ok(false));
    }
}
