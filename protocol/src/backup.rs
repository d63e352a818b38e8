//! Copies of streams on a second node, so that they outlive the one that the client asked: the wire
//! types of the RPC methods [`KEEP`] and [`FETCH`].
//!
//! ```text
//! ingress ──► keeper       Keep: the request once, then entries as they come    ──► Kept
//! any node ──► keeper      Fetch: after the ingress has died                    ──► Fetched
//! ```
//!
//! Who keeps a stream needs no agreement: the ingress takes the members in the order of [`rank`], and
//! who looks for it asks in the same order.

use bincode::{Decode, Encode};

use crate::forward::Endpoint;
use crate::journal::Entry;
use crate::wire::{self, DecodeError};
use crate::{NodeId, RequestId};

/// Method: keep this of a stream.
pub const KEEP: &str = "journal-keep";
/// Method: what is kept of a stream.
pub const FETCH: &str = "journal-fetch";

/// A request, as whoever goes on with it needs it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Begin {
    pub endpoint: Endpoint,
    /// Seconds since 1970.
    pub created: u64,
    /// Names the weights that it began on; see the router.
    pub weights: u64,
    /// The HTTP body.
    pub body: Vec<u8>,
}

/// More of a stream.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Keep {
    pub tenant: String,
    pub request: u128,
    /// In the first message to this keeper.
    pub begin: Option<Begin>,
    /// Entries before these.
    pub from: u64,
    pub entries: Vec<Entry>,
    /// The client has all of it: nobody will ask for long.
    pub is_complete: bool,
}

/// What the keeper has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Kept {
    /// So many entries. If that is less than were sent, the rest goes from there.
    Entries(u64),
    /// Nothing of it: it must hear the beginning.
    Unknown,
    /// It keeps no more streams.
    Full,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Fetch {
    pub tenant: String,
    pub request: u128,
    /// The first entry wanted; the beginning comes with entry 0.
    pub from: u64,
}

#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Fetched {
    pub begin: Option<Begin>,
    pub entries: Vec<Entry>,
    /// Entries in all.
    pub total: u64,
}

macro_rules! bytes {
    ($($message:ident),*) => {$(
        impl $message {
            pub fn to_bytes(&self) -> Vec<u8> {
                wire::encode(self)
            }

            /// # Errors
            /// If the bytes are no such message, or more than [`MESSAGE_BYTES_MAX`].
            pub fn from_bytes(bytes: &[u8]) -> Result<$message, DecodeError> {
                wire::decode::<_, MESSAGE_BYTES_MAX>(bytes)
            }
        }
    )*};
}

bytes!(Keep, Kept, Fetch, Fetched);

/// Rendezvous hashing (Thaler and Ravishankar, 1998): the member with the highest rank keeps a stream.
/// The loss of one moves its streams only.
pub fn rank(request: RequestId, node: NodeId) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&request.0.to_le_bytes()).update(&node.0);
    let hash = hasher.finalize();
    u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"))
}

/// Bytes of a message: one frame of the data plane.
pub const MESSAGE_BYTES_MAX: usize = 960 << 10;
/// Longest body of a request that is copied; a stream with a longer one dies with its ingress.
pub const BODY_BYTES_MAX: usize = 512 << 10;
/// Entries of one message at most: they fit beside the longest body with 20 alternatives each.
pub const ENTRIES_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Ended;

    #[test]
    fn golden() {
        let begin =
            Begin { endpoint: Endpoint::Chat, created: 5, weights: 6, body: vec![b'{', b'}'] };
        let entries = vec![Entry::Finished { choice: 0, reason: Ended::Stop }];
        let keep = Keep {
            tenant: "a".to_owned(),
            request: 7,
            begin: Some(begin.clone()),
            from: 0,
            entries: entries.clone(),
            is_complete: false,
        };
        let bytes = [1, b'a', 7, 1, 0, 5, 6, 2, b'{', b'}', 0, 1, 2, 0, 0, 0];
        assert_eq!(keep.to_bytes(), bytes);
        assert_eq!(Keep::from_bytes(&bytes), Ok(keep));
        for (kept, bytes) in
            [(Kept::Entries(3), &[0, 3][..]), (Kept::Unknown, &[1]), (Kept::Full, &[2])]
        {
            assert_eq!(kept.to_bytes(), bytes);
            assert_eq!(Kept::from_bytes(bytes), Ok(kept));
        }
        let fetch = Fetch { tenant: "a".to_owned(), request: 7, from: 2 };
        assert_eq!(fetch.to_bytes(), [1, b'a', 7, 2]);
        assert_eq!(Fetch::from_bytes(&[1, b'a', 7, 2]), Ok(fetch));
        let fetched = Fetched { begin: Some(begin), entries, total: 1 };
        let bytes = [1, 0, 5, 6, 2, b'{', b'}', 1, 2, 0, 0, 1];
        assert_eq!(fetched.to_bytes(), bytes);
        assert_eq!(Fetched::from_bytes(&bytes), Ok(fetched));
    }

    #[test]
    fn damaged_messages_are_errors() {
        for end in 0..4 {
            assert!(Fetch::from_bytes(&[1, b'a', 7, 2][..end]).is_err());
        }
        assert!(Keep::from_bytes(&vec![0; MESSAGE_BYTES_MAX + 1]).is_err());
        for first in 0..=255u8 {
            for second in 0..=255 {
                let bytes = [first, second, 1, 1, 250, 7, 9, 253, 255, 255, 255];
                let _ = (Keep::from_bytes(&bytes), Fetched::from_bytes(&bytes));
            }
        }
    }

    #[test]
    fn ranks_spread_and_stay() {
        let nodes: Vec<NodeId> = (0..5).map(|n| NodeId([n; 32])).collect();
        let first = |request: u128, nodes: &[NodeId]| {
            *nodes.iter().max_by_key(|node| rank(RequestId(request), **node)).unwrap()
        };
        let mut kept = [0; 5];
        for request in 0..1000 {
            let keeper = first(request, &nodes);
            kept[keeper.0[0] as usize] += 1;
            // Without another node nothing changes.
            let others: Vec<NodeId> =
                nodes.iter().copied().filter(|n| *n == keeper || n.0[0] % 2 == 0).collect();
            assert_eq!(first(request, &others), keeper);
        }
        assert!(kept.iter().all(|count| (150..250).contains(count)), "{kept:?}");
    }
}
