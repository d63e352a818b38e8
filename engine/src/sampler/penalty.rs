//! Tokens seen so far, and what they cost.

use super::SamplingParams;
use protocol::TokenId;
use std::collections::BTreeMap;

/// How often each token was seen. Keeps nothing when no penalty is set.
#[derive(Clone, Debug)]
pub struct TokenCounts {
    enabled: bool,
    seen: BTreeMap<TokenId, Seen>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    generated: u32,
}

impl TokenCounts {
    pub fn new(enabled: bool, prompt: &[TokenId]) -> Self {
        let prompt = if enabled { prompt } else { &[] };
        TokenCounts { enabled, seen: prompt.iter().map(|&t| (t, Seen::default())).collect() }
    }

    pub fn push(&mut self, token: TokenId) {
        if self.enabled {
            self.seen.entry(token).or_default().generated += 1;
        }
    }

    /// Applies repetition (multiplicative), then presence and frequency penalties (additive).
    pub fn penalize(&self, params: &SamplingParams, logits: &mut [f32]) {
        for (&token, seen) in &self.seen {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            let r = params.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / r } else { *logit * r };
            if seen.generated > 0 {
                *logit -=
                    params.presence_penalty + params.frequency_penalty * seen.generated as f32;
            }
        }
    }
}
