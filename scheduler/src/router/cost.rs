//! What an answer costs, in microseconds of waiting: the one model behind both decisions, which replica
//! decodes and where the keys and values of its prompt come from.
//!
//! ```text
//! ttft  = queue + raise + kv + prefill + hop          of the cheapest way to the prompt's keys and values
//! score = ttft + decode_weight * added gaps
//! ```
//!
//! Sums of measured rates, nothing learned: each part can be looked at and disputed.

use cache::transfer::CHUNK_BYTES_MAX;
use protocol::{Duration, NodeId};

use super::links::LinkFigures;
use super::{ReplicaLoad, RouterConfig};

/// Where the keys and values of a prompt come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvPath {
    /// The replica computes all of them.
    Recompute,
    /// It has the beginning of the prompt in its cache, and computes the rest.
    Local,
    /// It fetches the beginning from a peer's cache, and computes the rest.
    Fetch { from: NodeId },
    /// A peer computes what is missing.
    Remote { by: NodeId },
}

impl KvPath {
    pub const fn as_str(self) -> &'static str {
        match self {
            KvPath::Recompute => "recompute",
            KvPath::Local => "local",
            KvPath::Fetch { .. } => "fetch",
            KvPath::Remote { .. } => "remote",
        }
    }

    /// The peer that has a part in it.
    pub const fn peer(self) -> Option<NodeId> {
        match self {
            KvPath::Recompute | KvPath::Local => None,
            KvPath::Fetch { from } => Some(from),
            KvPath::Remote { by } => Some(by),
        }
    }
}

/// The parts of an estimate, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CostParts {
    pub path: KvPath,
    /// Prompts that are computed before, where this one is.
    pub queue_us: u64,
    /// Bringing up what lies below the pool of whoever has it.
    pub raise_us: u64,
    /// Keys and values on their way, as far as nothing else happens meanwhile.
    pub kv_us: u64,
    /// Computing what no cache has.
    pub prefill_us: u64,
    /// To the node and back.
    pub hop_us: u64,
    /// What the answer's own gaps and those that it adds to its neighbours' weigh.
    pub decode_us: u64,
}

impl CostParts {
    /// Until the first token.
    pub fn ttft_us(&self) -> u64 {
        self.queue_us
            .saturating_add(self.raise_us)
            .saturating_add(self.kv_us)
            .saturating_add(self.prefill_us)
            .saturating_add(self.hop_us)
    }

    /// All of it; lower is better.
    pub fn score_us(&self) -> u64 {
        self.ttft_us().saturating_add(self.decode_us)
    }
}

/// Time to compute prompt tokens at so many a second; 0 is a rate that nobody has measured.
pub(super) fn compute_us(tokens: u64, prefill_rate: u32) -> u64 {
    let rate = if prefill_rate == 0 { PREFILL_RATE_GUESS } else { prefill_rate };
    quotient(tokens.saturating_mul(1_000_000), u64::from(rate))
}

/// Time for so many tokens' keys and values on a path.
pub(super) fn transfer_us(tokens: u64, bytes_per_token: u32, link: LinkFigures) -> u64 {
    let bytes = tokens.saturating_mul(u64::from(bytes_per_token));
    quotient(bytes.saturating_mul(1_000_000), link.bytes_per_s_or_guess())
}

/// What a token below the pool takes to be in it, nanoseconds: as measured by its node, or guessed for one
/// that lies there and was never asked for. No longer than computing it, which a replica does where its
/// disk is slower.
pub(super) fn raise_ns_per_token(load: &ReplicaLoad) -> u64 {
    let ns = match load.below_ns_per_token {
        0 => u64::from(load.kv_bytes_per_token) * 1_000_000_000 / BELOW_BYTES_PER_S_GUESS,
        ns => u64::from(ns),
    };
    ns.min(compute_us(1_000, load.prefill_rate))
}

/// So many tokens from below the pool.
pub(super) fn raise_us(tokens: u64, ns_per_token: u64) -> u64 {
    tokens.saturating_mul(ns_per_token) / 1_000
}

/// A cached beginning from one replica's pool to another's. Both take part between two steps only: each
/// has a turn to begin with, and then one for every chunk, unless the path is slower than their turns.
pub(super) fn fetch_us(
    tokens: u64,
    bytes_per_token: u32,
    link: LinkFigures,
    turns_us: [u64; 2],
) -> u64 {
    let bytes = tokens.saturating_mul(u64::from(bytes_per_token));
    let chunks = bytes.div_ceil(CHUNK_BYTES_MAX as u64);
    let [one_us, other_us] = turns_us;
    let chunks_us = one_us.max(other_us).saturating_mul(chunks);
    transfer_us(tokens, bytes_per_token, link)
        .max(chunks_us)
        .saturating_add(micros(link.rtt_or_guess()))
        .saturating_add(one_us.saturating_add(other_us))
}

/// The tail of a hand-off that no computing hides: what is left of the transfer, its last chunk at
/// least, the commit and the way there and back.
pub(super) fn hand_off_us(
    tokens: u64,
    bytes_per_token: u32,
    link: LinkFigures,
    hidden_us: u64,
) -> u64 {
    let all = transfer_us(tokens, bytes_per_token, link);
    let last_chunk = transfer_us(tokens.min(CHUNK_TOKENS), bytes_per_token, link);
    let rtt = micros(link.rtt_or_guess());
    all.saturating_sub(hidden_us).max(last_chunk).saturating_add(rtt).saturating_add(COMMIT_US)
}

/// Whether another way saves enough against doing it here to be worth its risks.
pub(super) fn is_gain(here_us: u64, other_us: u64, config: &RouterConfig) -> bool {
    let least = micros(config.gain_min).max(here_us / 100 * u64::from(config.gain_min_percent));
    other_us.saturating_add(least) < here_us
}

/// The gaps of each token of an answer, its own and those that it adds to its neighbours'.
pub(super) fn gap_us(step_us: u32, streams: u64, config: &RouterConfig) -> u64 {
    let step = if step_us == 0 { micros(config.step_guess) } else { u64::from(step_us) };
    let added = step.saturating_mul(u64::from(config.stream_share_percent)) / 100;
    step.saturating_add(added.saturating_mul(streams.saturating_add(1)))
}

/// What the gaps of the answer cost.
pub(super) fn decode_us(gap_us: u64, output_tokens: u64, config: &RouterConfig) -> u64 {
    weighed(gap_us.saturating_mul(output_tokens), config)
}

/// What a prefill of so long costs those that decode beside it: each gets its next tokens that much
/// later.
pub(super) fn harm_us(prefill_us: u64, streams: u64, config: &RouterConfig) -> u64 {
    weighed(prefill_us.saturating_mul(streams), config)
}

fn weighed(us: u64, config: &RouterConfig) -> u64 {
    us.saturating_mul(u64::from(config.decode_weight_percent)) / 100
}

/// How long a replica lets those wait who want blocks of it, or bring it some: it hears them between two
/// steps, at once if it computes none.
pub(super) fn turn_us(load: &ReplicaLoad, config: &RouterConfig) -> u64 {
    match (streams(load), load.decode_step_us) {
        (0, _) => 0,
        (_, 0) => micros(config.step_guess),
        (_, us) => u64::from(us),
    }
}

/// Those that decode, and those that will.
pub(super) fn streams(load: &ReplicaLoad) -> u64 {
    u64::from(load.running) + u64::from(load.waiting)
}

/// `n / d`, `d` not 0. Several of them are made for every candidate of a decision, and floats divide in a
/// fraction of the time. They are exact where `n` is: the nearest float to a quotient below a whole number
/// `k` is `k` only if they lie closer than `k / 2^53`, and the next quotient below it is `1 / d` away.
fn quotient(n: u64, d: u64) -> u64 {
    match n < 1 << f64::MANTISSA_DIGITS {
        true => (n.cast_signed() as f64 / d as f64) as u64,
        false => n / d,
    }
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Prompt tokens per second of a replica that has measured nothing yet: low, so that measured ones
/// are preferred, and high enough that it gets a request to measure.
pub const PREFILL_RATE_GUESS: u32 = 200;
/// Of a disk that nothing came from yet: a solid one of the plainer kind.
const BELOW_BYTES_PER_S_GUESS: u64 = 500_000_000;
/// Verifying and attaching the last blocks of a hand-off.
const COMMIT_US: u64 = 2_000;
/// Tokens that a prefill computes before their keys and values leave: a step's.
const CHUNK_TOKENS: u64 = 512;

#[cfg(test)]
mod tests {
    use protocol::random::mix;

    use super::*;

    #[test]
    fn floats_divide_as_integers_do() {
        let check = |n: u64, d: u64| assert_eq!(quotient(n, d), n / d, "{n} / {d}");
        for k in 0..200_000 {
            let (a, b) = (mix(2 * k + 1), mix(2 * k + 2));
            let (n, d) = (a >> (b % 64), (b >> (a % 64)).max(1));
            check(n, d);
            // Where rounding would show: next to a multiple.
            for near in [n / d * d, (n / d * d).saturating_sub(1), (n / d * d).saturating_add(1)] {
                check(near, d);
            }
        }
        for n in [0, 1, (1 << 53) - 1, 1 << 53, (1 << 53) + 1, u64::MAX] {
            for d in [1, 2, 3, (1 << 53) - 1, 1 << 53, (1 << 53) + 1, u64::MAX] {
                check(n, d);
            }
        }
    }
}
