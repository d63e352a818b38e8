//! What a request may ask of the sampler, and within which bounds.

use protocol::TokenId;
use thiserror::Error;

/// How a token is chosen. `Default` is greedy decoding without penalties.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy: the most probable token, whatever the rest says. At most 2.
    pub temperature: f32,
    /// Keep only the `top_k` most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of tokens with at least this probability together (nucleus, arXiv:1904.09751).
    pub top_p: f32,
    /// Drop tokens less probable than `min_p` times the best one (arXiv:2407.01082).
    pub min_p: f32,
    /// Divides (or multiplies, if negative) the logits of tokens seen in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of each token already generated.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token for each time it was generated.
    pub frequency_penalty: f32,
    /// Added to logits before anything is cut.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// `Some(n)`: report log-probabilities, and those of the `n` best tokens.
    pub logprobs: Option<usize>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            logprobs: None,
        }
    }
}

/// A parameter out of its range. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Error)]
#[error("{field} must be {expected}")]
pub struct ParamError {
    /// The field's name in the API.
    pub field: &'static str,
    pub expected: &'static str,
}

impl SamplingParams {
    /// Refuses values outside OpenAI's ranges (and, for the extensions, vLLM's).
    pub fn validate(&self, vocab: usize) -> Result<(), ParamError> {
        let within = |x: f32, lo: f32, hi: f32| (lo..=hi).contains(&x);
        let checks = [
            (within(self.temperature, 0.0, 2.0), "temperature", "between 0 and 2"),
            (self.top_p > 0.0 && self.top_p <= 1.0, "top_p", "above 0 and at most 1"),
            (within(self.min_p, 0.0, 1.0), "min_p", "between 0 and 1"),
            (
                self.repetition_penalty > 0.0 && self.repetition_penalty <= 10.0,
                "repetition_penalty",
                "above 0 and at most 10",
            ),
            (within(self.presence_penalty, -2.0, 2.0), "presence_penalty", "between -2 and 2"),
            (within(self.frequency_penalty, -2.0, 2.0), "frequency_penalty", "between -2 and 2"),
            (self.logprobs.is_none_or(|n| n <= LOGPROBS_MAX), "top_logprobs", "between 0 and 20"),
            (self.logit_bias.len() <= LOGIT_BIAS_MAX, "logit_bias", "a map of at most 1024 tokens"),
            (
                self.logit_bias
                    .iter()
                    .all(|&(t, b)| (t as usize) < vocab && within(b, -100.0, 100.0)),
                "logit_bias",
                "a map from token ids of the model's vocabulary to values between -100 and 100",
            ),
        ];
        match checks.into_iter().find(|(ok, _, _)| !ok) {
            Some((_, field, expected)) => Err(ParamError { field, expected }),
            None => Ok(()),
        }
    }

    pub(super) fn penalizes(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

/// Most alternatives reported for a token, as in OpenAI's API.
const LOGPROBS_MAX: usize = 20;
/// Most entries of a bias map.
const LOGIT_BIAS_MAX: usize = 1024;
