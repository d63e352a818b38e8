//! What the tests of this module share.

use super::*;
use crate::NodeId;

/// The key number `n`. By habit 0 is the root and 1 the founder.
pub fn key(n: u8) -> NodeKey {
    NodeKey::from_secret([n; 32])
}

pub const NOW: UnixTime = UnixTime(1_800_000_000);

/// A mesh of the root 0 and the authorities `members`, the first of which is the founder.
pub fn trust(members: &[u8]) -> Trust {
    let mut trust = Trust::found(&key(0), key(members[0]).id(), NOW);
    let ids: Vec<NodeId> = members.iter().map(|&n| key(n).id()).collect();
    if members.len() > 1 {
        trust.change_authorities(&key(members[0]), ids, NOW).unwrap();
    }
    trust
}

pub fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

/// Changes of `bytes` that a decoder must survive: each bit of each byte, each cut, each length grown,
/// the same for every run.
pub fn mutations(bytes: &[u8]) -> impl Iterator<Item = Vec<u8>> + '_ {
    let flips = (0..bytes.len() * 8).map(|bit| {
        let mut changed = bytes.to_vec();
        changed[bit / 8] ^= 1 << (bit % 8);
        changed
    });
    let huge = (0..bytes.len()).flat_map(|at| {
        [251u8, 252, 253, 254, 255].map(|marker| {
            let mut changed = bytes.to_vec();
            changed[at] = marker;
            changed
        })
    });
    let cuts = (0..bytes.len()).map(|end| bytes[..end].to_vec());
    let grown = [0u8, 1, 255].map(|last| [bytes, &[last]].concat());
    flips.chain(huge.filter(move |changed| changed != bytes)).chain(cuts).chain(grown)
}
