//! What transfers have done since the start.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cache::transfer::{AttemptError, HandOffOutcome, SenderOutcome};

use crate::metrics::Sample;

#[derive(Debug, Default)]
pub(crate) struct Counters {
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
    blocks_received: AtomicU64,
    hand_offs: [AtomicU64; OUTCOMES.len()],
    attempts_failed: AtomicU64,
    misbehaviours: AtomicU64,
    /// From the first ask to the last block, of those that were complete.
    complete_us: AtomicU64,
    served: [AtomicU64; SERVED.len()],
}

impl Counters {
    pub fn sent(&self, bytes: usize) {
        self.bytes_sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn received(&self, bytes: usize) {
        self.bytes_received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn attempt_failed(&self, error: &AttemptError) {
        self.attempts_failed.fetch_add(1, Ordering::Relaxed);
        if error.is_misbehaviour() {
            self.misbehaviours.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn ended(&self, outcome: &HandOffOutcome, verified: usize, took: Duration) {
        if matches!(outcome, HandOffOutcome::Complete { .. }) {
            let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            self.complete_us.fetch_add(us, Ordering::Relaxed);
        }
        self.blocks_received.fetch_add(verified as u64, Ordering::Relaxed);
        let outcome = match outcome {
            HandOffOutcome::Complete { .. } => 0,
            HandOffOutcome::Incomplete(_) => 1,
            HandOffOutcome::NoRoom => 2,
            HandOffOutcome::Deadline => 3,
            HandOffOutcome::Cancelled => 4,
            HandOffOutcome::Rejected(_) => 5,
        };
        self.hand_offs[outcome].fetch_add(1, Ordering::Relaxed);
    }

    pub fn served(&self, outcome: &SenderOutcome) {
        let outcome = match outcome {
            SenderOutcome::Complete => 0,
            SenderOutcome::Refused(_) => 1,
            SenderOutcome::Closed => 2,
        };
        self.served[outcome].fetch_add(1, Ordering::Relaxed);
    }

    pub fn samples(&self) -> Vec<Sample> {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64;
        let bytes = |way, n| Sample::labelled("grapevine_kv_bytes_total", "direction", way, n);
        let mut samples = vec![
            bytes("in", value(&self.bytes_received)),
            bytes("out", value(&self.bytes_sent)),
            Sample::new("grapevine_kv_blocks_attached_total", value(&self.blocks_received)),
            Sample::new("grapevine_kv_attempts_failed_total", value(&self.attempts_failed)),
            Sample::new("grapevine_kv_misbehaviours_total", value(&self.misbehaviours)),
            Sample::new(
                "grapevine_kv_hand_off_seconds_total",
                value(&self.complete_us) / 1_000_000.0,
            ),
        ];
        for (outcome, counter) in OUTCOMES.iter().zip(&self.hand_offs) {
            let name = "grapevine_kv_hand_offs_total";
            samples.push(Sample::labelled(name, "outcome", outcome, value(counter)));
        }
        for (outcome, counter) in SERVED.iter().zip(&self.served) {
            let name = "grapevine_kv_transfers_served_total";
            samples.push(Sample::labelled(name, "outcome", outcome, value(counter)));
        }
        samples
    }
}

const OUTCOMES: [&str; 6] =
    ["complete", "incomplete", "no_room", "deadline", "cancelled", "rejected"];
const SERVED: [&str; 3] = ["complete", "refused", "closed"];
