//! Truncation and the draw.

use super::{SamplingParams, argmax};
use protocol::{RequestId, TokenId};

/// What makes the draws of one sequence its own: the request (or the client's seed) and the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SamplerKey([u8; 32]);

impl SamplerKey {
    /// Reproducible draws: the same seed, choice and logits give the same tokens on every node.
    pub fn from_seed(seed: i64, choice: usize) -> Self {
        Self::derive("seed", &seed.to_le_bytes(), choice)
    }

    /// Draws that differ from request to request.
    pub fn from_request(request: RequestId, choice: usize) -> Self {
        Self::derive("request", &request.0.to_le_bytes(), choice)
    }

    fn derive(kind: &str, id: &[u8], choice: usize) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("grapevine 2026 sampler key v1");
        hasher.update(kind.as_bytes()).update(id).update(&(choice as u64).to_le_bytes());
        SamplerKey(*hasher.finalize().as_bytes())
    }
}

/// A number in `[0, 1)` with 53 random bits, a pure function of key and index.
pub(super) fn uniform(key: &SamplerKey, index: u64) -> f64 {
    let hash = blake3::keyed_hash(&key.0, &index.to_le_bytes());
    let [a, b, c, d, e, f, g, h, ..] = *hash.as_bytes();
    let bits = u64::from_le_bytes([a, b, c, d, e, f, g, h]) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// Scratch of the draw, reused from token to token.
#[derive(Clone, Debug, Default)]
pub(super) struct Candidates {
    /// (token, unnormalised probability): `exp((logit - max) / temperature)`.
    weighted: Vec<(TokenId, f32)>,
}

impl Candidates {
    /// Temperature first, then min-p, top-k and top-p, each on what the one before left.
    pub fn draw(&mut self, params: &SamplingParams, logits: &[f32], u: f64) -> Option<TokenId> {
        let max = logits[argmax(logits)? as usize];
        if max == f32::INFINITY {
            return argmax(logits);
        }
        self.collect(logits, max, params);
        if params.top_k > 0 && params.top_k < self.weighted.len() {
            self.weighted.select_nth_unstable_by(params.top_k - 1, heavier_first);
            self.weighted.truncate(params.top_k);
        }
        if params.top_p < 1.0 {
            self.keep_nucleus(params.top_p);
        }
        // One order whatever the selection left behind, so that equal inputs draw equal tokens.
        self.weighted.sort_unstable_by_key(|&(token, _)| token);
        let mut target = u * total(&self.weighted);
        for &(token, weight) in &self.weighted {
            target -= f64::from(weight);
            if target < 0.0 {
                return Some(token);
            }
        }
        // Rounding may leave a rest as small as the last bit.
        self.weighted.last().map(|&(token, _)| token)
    }

    fn collect(&mut self, logits: &[f32], max: f32, params: &SamplingParams) {
        let scale = 1.0 / params.temperature.max(TEMPERATURE_MIN);
        let floor = params.min_p.max(WEIGHT_MIN);
        // A cheap comparison spares the exponential for nearly the whole vocabulary.
        let cut = max + floor.ln() / scale;
        self.weighted.clear();
        for (token, &logit) in logits.iter().enumerate() {
            if logit >= cut {
                self.weighted.push((token as TokenId, ((logit - max) * scale).exp()));
            }
        }
    }

    /// Sorts only as far as the nucleus reaches.
    fn keep_nucleus(&mut self, top_p: f32) {
        let goal = f64::from(top_p) * total(&self.weighted);
        let mut sorted = 64.min(self.weighted.len());
        loop {
            if sorted < self.weighted.len() {
                self.weighted.select_nth_unstable_by(sorted, heavier_first);
            }
            self.weighted[..sorted].sort_unstable_by(heavier_first);
            let mut mass = 0.0;
            let inside = self.weighted[..sorted].iter().position(|&(_, weight)| {
                mass += f64::from(weight);
                mass >= goal
            });
            if let Some(last) = inside {
                self.weighted.truncate(last + 1);
                return;
            }
            if sorted == self.weighted.len() {
                return;
            }
            sorted = (sorted * 8).min(self.weighted.len());
        }
    }
}

fn heavier_first(a: &(TokenId, f32), b: &(TokenId, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Summed in double precision over the slice's order; orders of equal sets differ by less than the
/// 53 bits of the draw can see.
fn total(weighted: &[(TokenId, f32)]) -> f64 {
    weighted.iter().map(|&(_, weight)| f64::from(weight)).sum()
}

/// Below this the division would overflow; it is greedy in effect.
const TEMPERATURE_MIN: f32 = 1e-3;
/// Tokens a billion times less probable than the best are never drawn.
const WEIGHT_MIN: f32 = 1e-9;
