//! The uses of tokens.
//!
//! Class **escrow**: each token has one home authority that counts it ([`super::SignedRecord::home`]).
//! The shell makes a use durable before the certificate leaves, then tells the other authorities, so
//! that whoever becomes the home next goes on counting. What a home had counted and not yet told when it
//! was lost for good can be used once more: at most the token's `uses`.

use std::collections::{BTreeMap, BTreeSet};

use bincode::{Decode, Encode};

use crate::NodeId;

use super::invite::{InviteId, InviteRecord};
use super::unix_time::UnixTime;

/// That a node joined with a token.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct InviteUse {
    pub id: InviteId,
    pub node: NodeId,
    /// Of the token: until then the use must be remembered.
    pub expires: UnixTime,
}

/// Which node used which token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    entries: BTreeMap<InviteId, Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    expires: UnixTime,
    nodes: BTreeSet<NodeId>,
}

/// What came of a redemption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Redemption {
    /// A use was counted; it must be durable before anything is sent.
    Counted(InviteUse),
    /// This node has used this token before and lost the answer; nothing was counted.
    Again,
}

impl Ledger {
    /// Counts a use of the token by `node`. The record must have been checked.
    ///
    /// # Errors
    /// If the token is used up, or too many tokens are alive. Nothing has changed then.
    pub fn redeem(
        &mut self,
        record: &InviteRecord,
        node: NodeId,
        now: UnixTime,
    ) -> Result<Redemption, RedeemError> {
        let InviteRecord { id, uses, expires, .. } = *record;
        if let Some(entry) = self.entries.get(&id) {
            if entry.nodes.contains(&node) {
                return Ok(Redemption::Again);
            }
            if entry.nodes.len() >= usize::from(uses) {
                return Err(RedeemError::UsedUp { uses });
            }
        }
        self.make_room(id, now)?;
        let used = InviteUse { id, node, expires };
        self.insert(&used);
        Ok(Redemption::Counted(used))
    }

    /// Takes over uses that another authority counted, or that were on the disk; says how many were new.
    ///
    /// # Errors
    /// If there is no room; the uses before that have been taken over.
    pub fn merge(&mut self, uses: &[InviteUse], now: UnixTime) -> Result<usize, RedeemError> {
        let mut news = 0;
        for used in uses.iter().filter(|u| now <= u.expires.plus(KEEP_S)) {
            self.make_room(used.id, now)?;
            news += usize::from(self.insert(used));
        }
        Ok(news)
    }

    /// Every use, for a new authority or the disk.
    pub fn uses(&self) -> impl Iterator<Item = InviteUse> + '_ {
        self.entries.iter().flat_map(|(&id, entry)| {
            entry.nodes.iter().map(move |&node| InviteUse { id, node, expires: entry.expires })
        })
    }

    /// How many nodes joined with this token.
    pub fn used(&self, id: InviteId) -> usize {
        self.entries.get(&id).map_or(0, |entry| entry.nodes.len())
    }

    fn insert(&mut self, used: &InviteUse) -> bool {
        let InviteUse { id, node, expires } = *used;
        let new = || Entry { expires, nodes: BTreeSet::new() };
        let entry = self.entries.entry(id).or_insert_with(new);
        entry.nodes.len() < USES_KEPT_MAX && entry.nodes.insert(node)
    }

    fn make_room(&mut self, id: InviteId, now: UnixTime) -> Result<(), RedeemError> {
        if self.entries.len() >= INVITES_MAX && !self.entries.contains_key(&id) {
            self.entries.retain(|_, entry| now <= entry.expires.plus(KEEP_S));
            if self.entries.len() >= INVITES_MAX {
                return Err(RedeemError::Full);
            }
        }
        Ok(())
    }
}

/// Why a token's use was not counted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedeemError {
    #[error("the token has been used (it was for {uses}): make a new one with `vine invite`")]
    UsedUp { uses: u16 },
    #[error(
        "{INVITES_MAX} tokens are in use: wait until some expire, or make tokens for more nodes"
    )]
    Full,
}

/// Tokens that are counted at once.
pub const INVITES_MAX: usize = 1024;

/// As many as a token can have, and as many again that two homes in a row may count.
const USES_KEPT_MAX: usize = 512;

/// How long uses are remembered after the token's expiry, so that a clock which is set back does not
/// make a used token new: a day.
const KEEP_S: u64 = 86_400;

#[cfg(test)]
mod tests {
    use super::super::testing::{NOW, key};
    use super::super::{Roles, SetHash};
    use super::*;

    fn record(n: u64, uses: u16) -> InviteRecord {
        let mut id = [0; 32];
        id[..8].copy_from_slice(&n.to_le_bytes());
        InviteRecord {
            mesh: key(0).root().mesh(),
            id: InviteId(id),
            roles: Roles::ALL,
            uses,
            expires: NOW.plus(60),
            epoch: 1,
            head: SetHash([0; 32]),
        }
    }

    #[test]
    fn uses_are_counted_once() {
        let mut ledger = Ledger::default();
        let token = record(1, 2);
        let mut redeem = |node: u8| ledger.redeem(&token, key(node).id(), NOW);
        assert!(matches!(redeem(5), Ok(Redemption::Counted(_))));
        assert_eq!(redeem(5), Ok(Redemption::Again));
        assert!(matches!(redeem(6), Ok(Redemption::Counted(_))));
        assert_eq!(redeem(7), Err(RedeemError::UsedUp { uses: 2 }));
        assert_eq!(redeem(6), Ok(Redemption::Again));
        // The next home goes on counting.
        let mut next = Ledger::default();
        let uses: Vec<_> = ledger.uses().collect();
        assert_eq!(next.merge(&uses, NOW), Ok(2));
        assert_eq!(next.merge(&uses, NOW), Ok(0));
        assert_eq!(next, ledger);
        let refused = next.redeem(&token, key(7).id(), NOW);
        assert_eq!(refused, Err(RedeemError::UsedUp { uses: 2 }));
    }

    #[test]
    fn bounded_and_forgetful_only_after_expiry() {
        let mut ledger = Ledger::default();
        for n in 0..INVITES_MAX as u64 {
            ledger.redeem(&record(n, 1), key(5).id(), NOW).unwrap();
        }
        let more = record(INVITES_MAX as u64, 1);
        for (now, ok) in
            [(NOW, false), (NOW.plus(60 + KEEP_S), false), (NOW.plus(61 + KEEP_S), true)]
        {
            assert_eq!(ledger.redeem(&more, key(5).id(), now).is_ok(), ok, "{now}");
        }
        assert_eq!(ledger.uses().count(), 1);
    }
}
