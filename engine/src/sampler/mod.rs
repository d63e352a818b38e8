//! Logits to a token.
//!
//! Owns penalties, bias, temperature, truncation (top-k, top-p, min-p), log-probabilities and the
//! draw. A draw depends on nothing but the key, the token's index and the logits: the generator is
//! counter-based (BLAKE3 keyed by the request), so that a stream that goes on at another node draws
//! the numbers it would have drawn here. Refuses to know about text, grammars' rules or batches.

mod draw;
mod params;
mod penalty;

pub use draw::SamplerKey;
pub use params::{ParamError, SamplingParams};
pub use penalty::TokenCounts;

use draw::{Candidates, uniform};
use protocol::TokenId;

/// A token with the log-probabilities that the client may see.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    pub token: TokenId,
    /// Natural log of the model's probability, before temperature, penalties and masks.
    /// 0 unless log-probabilities were asked for.
    pub logprob: f32,
    /// The most probable tokens of the same distribution, best first; empty unless asked for.
    pub top: Vec<(TokenId, f32)>,
}

/// The sampler of one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    key: SamplerKey,
    counts: TokenCounts,
    candidates: Candidates,
}

impl Sampler {
    /// `prompt` feeds the repetition penalty only, as in the paper that introduced it (CTRL,
    /// arXiv:1909.05858); presence and frequency penalties count generated tokens.
    pub fn new(params: SamplingParams, key: SamplerKey, prompt: &[TokenId]) -> Self {
        let counts = TokenCounts::new(params.penalizes(), prompt);
        Sampler { params, key, counts, candidates: Candidates::default() }
    }

    /// Draws the token at `index` (0 for the first generated one).
    ///
    /// `logits` has one row of the vocabulary and is used as scratch. `allowed`, one bit a token, is
    /// the grammar's mask. `None` when the mask or the logits leave nothing to draw from.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        index: u64,
        allowed: Option<&[u32]>,
    ) -> Option<SampledToken> {
        let raw = self.params.logprobs.map(|top| raw_logprobs(logits, top));
        self.counts.penalize(&self.params, logits);
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        if let Some(bits) = allowed {
            mask(logits, bits);
        }
        let token = if self.params.temperature == 0.0 {
            argmax(logits)?
        } else {
            let u = uniform(&self.key, index);
            self.candidates.draw(&self.params, logits, u)?
        };
        self.counts.push(token);
        let (logprob, top) = match raw {
            Some(raw) => (raw.of(token), raw.top),
            None => (0.0, Vec::new()),
        };
        Some(SampledToken { token, logprob, top })
    }

    /// Takes a token that was drawn elsewhere, so that the next draw goes on from it.
    pub fn replay(&mut self, token: TokenId) {
        self.counts.push(token);
    }
}

/// The first of the largest logits; `None` when no logit is above minus infinity.
pub fn argmax(logits: &[f32]) -> Option<TokenId> {
    let mut best = (f32::NEG_INFINITY, None);
    for (token, &logit) in logits.iter().enumerate() {
        if logit > best.0 {
            best = (logit, Some(token as TokenId));
        }
    }
    best.1
}

/// `ln Σ exp(logits)`, summed in double precision in vocabulary order.
pub fn log_sum_exp(logits: &[f32]) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return max;
    }
    let sum: f64 = logits.iter().map(|&l| f64::from((l - max).exp())).sum();
    max + sum.ln() as f32
}

struct RawLogprobs {
    log_z: f32,
    logits: Vec<f32>,
    top: Vec<(TokenId, f32)>,
}

impl RawLogprobs {
    fn of(&self, token: TokenId) -> f32 {
        self.logits[token as usize] - self.log_z
    }
}

fn raw_logprobs(logits: &[f32], top: usize) -> RawLogprobs {
    let log_z = log_sum_exp(logits);
    let top = top_tokens(logits, top).into_iter().map(|t| (t, logits[t as usize] - log_z));
    RawLogprobs { log_z, top: top.collect(), logits: logits.to_vec() }
}

/// The `n` tokens with the largest logits, best first, ties by id.
pub fn top_tokens(logits: &[f32], n: usize) -> Vec<TokenId> {
    let mut ids: Vec<TokenId> = (0..logits.len() as TokenId).collect();
    let by_logit = |a: &TokenId, b: &TokenId| {
        logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
    };
    if n == 0 {
        return Vec::new();
    }
    if n < ids.len() {
        ids.select_nth_unstable_by(n - 1, by_logit);
        ids.truncate(n);
    }
    ids.sort_unstable_by(by_logit);
    ids
}

fn mask(logits: &mut [f32], bits: &[u32]) {
    for (word, chunk) in logits.chunks_mut(32).enumerate() {
        let allowed = bits.get(word).copied().unwrap_or(0);
        if allowed == u32::MAX {
            continue;
        }
        for (bit, logit) in chunk.iter_mut().enumerate() {
            if allowed >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

#[cfg(test)]
mod tests;
