//! How often somebody may try: a token bucket for each address and for each token.

use std::collections::BTreeMap;

use crate::{Duration, Instant};

/// What is counted; `K` is an address or the id of a token.
#[derive(Clone, Debug)]
pub struct Attempts<K> {
    config: AttemptsConfig,
    /// When the bucket of each key will be full again; absent means full.
    full_at: BTreeMap<K, Instant>,
}

/// How many attempts are too many.
#[derive(Clone, Copy, Debug)]
pub struct AttemptsConfig {
    /// Unit: attempts at once. Too small: hosts behind one address that start together are refused. Too
    /// large: one host can keep the node busy checking signatures.
    pub burst: u32,
    /// Unit: time for one more attempt. Too small: as above. Too large: an honest host that was refused
    /// waits for long.
    pub refill: Duration,
    /// Unit: keys remembered, of about 100 bytes each. At the bound nobody new may try until a bucket is
    /// full again: under a flood, strangers wait and members do not.
    pub keys_max: usize,
}

impl<K: Ord + Clone> Attempts<K> {
    pub fn new(config: AttemptsConfig) -> Self {
        Attempts { config, full_at: BTreeMap::new() }
    }

    /// Counts an attempt.
    ///
    /// # Errors
    /// How long to wait, if there were too many.
    pub fn attempt(&mut self, now: Instant, key: &K) -> Result<(), Duration> {
        let AttemptsConfig { burst, refill, keys_max } = self.config;
        if !self.full_at.contains_key(key) && self.full_at.len() >= keys_max {
            self.full_at.retain(|_, full_at| *full_at > now);
            if self.full_at.len() >= keys_max {
                let first = self.full_at.values().min().copied().unwrap_or(now);
                return Err(first.saturating_since(now));
            }
        }
        let full_at = self.full_at.get(key).copied().unwrap_or(now).max(now);
        let empties = full_at + refill;
        let allowed = now + refill * burst;
        if empties > allowed {
            return Err(empties.saturating_since(allowed));
        }
        self.full_at.insert(key.clone(), empties);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_then_one_by_one() {
        let config = AttemptsConfig { burst: 3, refill: Duration::from_secs(10), keys_max: 2 };
        let mut attempts = Attempts::new(config);
        let mut at = |second: u64, key: u8| {
            attempts.attempt(Instant::from_millis(second * 1000), &key).map_err(|w| w.as_secs())
        };
        for (second, key, result) in [
            (0, 1, Ok(())),
            (0, 1, Ok(())),
            (0, 1, Ok(())),
            (0, 1, Err(10)),
            (4, 1, Err(6)),
            (10, 1, Ok(())),
            (10, 1, Err(10)),
            // The second key fits, the third waits until the second's bucket is full.
            (10, 2, Ok(())),
            (10, 3, Err(10)),
            (20, 3, Ok(())),
            (1000, 1, Ok(())),
        ] {
            assert_eq!(at(second, key), result, "key {key} at {second}");
        }
    }
}
