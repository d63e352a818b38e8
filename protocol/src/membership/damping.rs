//! Members whose accusations were wrong too often.

use std::collections::BTreeMap;

use crate::{Duration, Instant};

/// A score for each accuser that was refuted: one more for each time, halved every
/// [`HALF_LIFE`]. From [`SCORE_MAX`] on, its accusations are ignored. Only what an accuser said itself
/// counts, because relayed words can be put into anyone's mouth. Bounded by [`ACCUSERS_TRACKED_MAX`]:
/// beyond it the smallest score is forgotten.
#[derive(Debug)]
pub(super) struct Damping<I> {
    scores: BTreeMap<I, (u32, Instant)>,
}

impl<I: Copy + Ord> Damping<I> {
    pub fn new() -> Self {
        Damping { scores: BTreeMap::new() }
    }

    pub fn refuted(&mut self, now: Instant, accuser: I) {
        if !self.scores.contains_key(&accuser) && self.scores.len() >= ACCUSERS_TRACKED_MAX {
            let least = self.scores.iter().min_by_key(|(_, (score, at))| faded(*score, now - *at));
            if let Some(id) = least.map(|(id, _)| *id) {
                self.scores.remove(&id);
            }
        }
        let (score, at) = self.scores.entry(accuser).or_insert((0, now));
        *score = (faded(*score, now - *at) + 1).min(2 * SCORE_MAX);
        *at = now;
    }

    pub fn is_damped(&self, now: Instant, accuser: &I) -> bool {
        self.scores.get(accuser).is_some_and(|(score, at)| faded(*score, now - *at) >= SCORE_MAX)
    }
}

fn faded(score: u32, age: Duration) -> u32 {
    score >> (age.as_secs() / HALF_LIFE.as_secs()).min(31)
}

const SCORE_MAX: u32 = 4;
const HALF_LIFE: Duration = Duration::from_secs(60);
const ACCUSERS_TRACKED_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_too_often() {
        let mut damping = Damping::new();
        let at = |s: u64| Instant::from_millis(s * 1000);
        for second in 0..4 {
            assert!(!damping.is_damped(at(second), &1));
            damping.refuted(at(second), 1);
        }
        assert!(damping.is_damped(at(4), &1) && !damping.is_damped(at(4), &2));
        assert!(!damping.is_damped(at(70), &1), "it fades");
        for other in 2..2 + ACCUSERS_TRACKED_MAX {
            damping.refuted(at(5), other);
        }
        assert_eq!(damping.scores.len(), ACCUSERS_TRACKED_MAX);
        assert!(damping.is_damped(at(5), &1), "the smallest are forgotten first");
    }
}
