//! The least few of many.

/// Keeps so many values with the least keys, in their order; of equal ones those that came first.
#[derive(Debug)]
pub(super) struct Least<K, V> {
    room: usize,
    kept: Vec<(K, V)>,
}

impl<K: Ord + Copy, V> Least<K, V> {
    pub fn new(room: usize) -> Self {
        Least { room, kept: Vec::with_capacity(room) }
    }

    /// No value whose key is as great or greater will be kept; `None` while there is room.
    pub fn bound(&self) -> Option<K> {
        self.kept.get(self.room.checked_sub(1)?).map(|(key, _)| *key)
    }

    pub fn offer(&mut self, key: K, value: V) {
        if self.bound().is_some_and(|bound| bound <= key) {
            return;
        }
        self.kept.truncate(self.room.saturating_sub(1));
        let place = self.kept.partition_point(|(other, _)| *other <= key);
        self.kept.insert(place, (key, value));
    }

    pub fn into_values(self) -> impl Iterator<Item = V> {
        self.kept.into_iter().map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use protocol::random::mix;

    use super::Least;

    #[test]
    fn as_a_stable_sort_has_them() {
        for (count, room) in [(0, 3), (2, 3), (3, 3), (100, 1), (100, 9), (1000, 9)] {
            let all: Vec<(u64, u64)> = (0..count).map(|n| (mix(n + 1) % 40, n)).collect();
            let mut least = Least::new(room);
            all.iter().for_each(|&(key, n)| least.offer(key, n));
            let mut sorted = all;
            sorted.sort_by_key(|&(key, _)| key);
            let expect: Vec<u64> = sorted.iter().map(|&(_, n)| n).take(room).collect();
            assert_eq!(least.into_values().collect::<Vec<_>>(), expect, "{room} of {count}");
        }
    }
}
