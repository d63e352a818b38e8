//! Ids of requests.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};

use protocol::RequestId;

/// Makes request ids that no two nodes share: keyed hashes of a counter. The low 12 bits are zero,
/// for the prompts of one request ([`part`]).
pub(crate) struct RequestIds {
    key: RandomState,
    next: AtomicU64,
}

impl RequestIds {
    pub fn new() -> Self {
        RequestIds { key: RandomState::new(), next: AtomicU64::new(0) }
    }

    pub fn next(&self) -> RequestId {
        let count = self.next.fetch_add(1, Ordering::Relaxed);
        let high = self.key.hash_one((count, 0u8));
        let low = self.key.hash_one((count, 1u8));
        RequestId((u128::from(high) << 64 | u128::from(low)) & !PART_MASK)
    }
}

/// The id of one prompt of a request.
pub(crate) fn part(request: RequestId, index: usize) -> RequestId {
    RequestId(request.0 | (index as u128 & PART_MASK))
}

const PART_MASK: u128 = 0xfff;

const _: () = assert!(protocol::api::INPUTS_MAX as u128 <= PART_MASK + 1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_and_leave_room_for_parts() {
        let ids = RequestIds::new();
        let (a, b) = (ids.next(), ids.next());
        assert_ne!(a, b);
        assert_eq!(a.0 & PART_MASK, 0);
        assert_eq!(part(a, 0), a);
        assert_eq!(part(a, 5).0, a.0 + 5);
    }
}
