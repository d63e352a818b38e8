//! Which members' state is worth telling, and how often it was told.

use std::collections::BTreeMap;

/// Whose state a piece of news is. What it says is read from the view when it is sent, so that old
/// news of a member can never follow new ones.
pub(super) type Topic = u32;

/// This node itself; no slot has that number.
pub(super) const TOPIC_SELF: Topic = u32::MAX;

/// News waiting to be sent, the least sent first and among those the oldest (SWIM, Das et al. 2002,
/// section 4.1). One for each topic, at most `capacity`: beyond it, the most sent is dropped.
#[derive(Debug)]
pub(super) struct News {
    by_rank: BTreeMap<(u8, u64), Topic>,
    by_topic: BTreeMap<Topic, (u8, u64)>,
    next: u64,
    capacity: usize,
}

impl News {
    pub fn new(capacity: usize) -> Self {
        News { by_rank: BTreeMap::new(), by_topic: BTreeMap::new(), next: 0, capacity }
    }

    pub fn len(&self) -> usize {
        self.by_rank.len()
    }

    /// Whether some news has not been sent at all.
    pub fn has_fresh(&self) -> bool {
        self.by_rank.first_key_value().is_some_and(|((sends, _), _)| *sends == 0)
    }

    /// News about a topic; replaces older ones. True if another topic had to give way.
    pub fn push(&mut self, topic: Topic) -> bool {
        self.remove(topic);
        let dropped = self.len() >= self.capacity;
        if dropped && let Some((_, topic)) = self.by_rank.pop_last() {
            self.by_topic.remove(&topic);
        }
        self.put(0, topic);
        dropped
    }

    pub fn remove(&mut self, topic: Topic) {
        if let Some(rank) = self.by_topic.remove(&topic) {
            self.by_rank.remove(&rank);
        }
    }

    /// The first topics in the order in which they should be sent.
    pub fn first(&self, count: usize) -> Vec<Topic> {
        self.by_rank.values().copied().take(count).collect()
    }

    /// Counts one more time that a topic was sent, and ends it after `sends_max`.
    pub fn sent(&mut self, topic: Topic, sends_max: u8) {
        let Some(rank) = self.by_topic.remove(&topic) else { return };
        self.by_rank.remove(&rank);
        if rank.0 + 1 < sends_max {
            self.put(rank.0 + 1, topic);
        }
    }

    fn put(&mut self, sends: u8, topic: Topic) {
        let rank = (sends, self.next);
        self.next += 1;
        self.by_rank.insert(rank, topic);
        self.by_topic.insert(topic, rank);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn least_sent_first_and_bounded() {
        let mut news = News::new(3);
        for topic in [1, 2, 3] {
            assert!(!news.push(topic));
        }
        news.sent(1, 2);
        assert_eq!(news.first(9), [2, 3, 1]);
        assert!(news.push(4), "the most sent gives way");
        assert_eq!(news.first(9), [2, 3, 4]);
        assert!(!news.push(2), "a topic replaces itself");
        assert_eq!(news.first(2), [3, 4]);
        for topic in [2, 3, 4] {
            news.sent(topic, 1);
        }
        assert_eq!((news.len(), news.has_fresh()), (0, false));
        news.sent(9, 5);
        assert_eq!(news.len(), 0);
    }
}
