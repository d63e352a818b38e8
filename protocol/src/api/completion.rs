//! `/v1/completions`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::sampling::{validate_choices, validate_stream_options, validate_top_logprobs};
use super::{ApiError, ErrorCode, FinishReason, Grammar, Input, Stop, StreamOptions, Usage};
use crate::TokenId;

/// The body of `POST /v1/completions`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CompletionRequest {
    pub model: String,
    pub prompt: Input,
    /// Most tokens of each choice; 16 if absent, as OpenAI has it. 0 only with `echo`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// Choices for each prompt, 1 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<u32>,
    /// Only the value of `n` is served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_of: Option<u32>,
    /// Put the prompt before each answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub echo: Option<bool>,
    /// Not served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suffix: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<Stop>,
    /// 1 if absent; 0 is greedy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// Extension: keep the k most probable tokens; 0 or absent keeps all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Extension: drop tokens less probable than this share of the best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// Extension: 1 is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f32>,
    /// Token ids to values between -100 and 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub logit_bias: Option<BTreeMap<TokenId, f32>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Report log-probabilities, and those of this many best tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 20)]
    pub logprobs: Option<u32>,
    /// Extension: the answer must match this grammar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grammar: Option<Grammar>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream_options: Option<StreamOptions>,
    /// The client's name for its user. Taken, not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Extension: higher goes first; 0 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i8>,
    /// Extension: go on past the end of text; for measuring.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ignore_eos: Option<bool>,
}

impl CompletionRequest {
    /// Checks what needs no model. Ranges of sampling parameters are the sampler's to check.
    pub fn validate(&self) -> Result<(), ApiError> {
        self.prompt.validate("prompt", false)?;
        let echo = self.echo == Some(true);
        if self.max_tokens == Some(0) && !echo {
            return Err(ApiError::value("max_tokens", "at least 1 where echo is not true"));
        }
        validate_choices(self.n)?;
        let n = self.n.unwrap_or(1);
        if self.best_of.is_some_and(|best_of| best_of != n) {
            return Err(ApiError::new(
                ErrorCode::UnsupportedParameter,
                format!("best_of is served only where it equals n, which is {n}"),
            )
            .at("best_of"));
        }
        if self.suffix.as_ref().is_some_and(|s| !s.is_empty()) {
            return Err(ApiError::new(
                ErrorCode::UnsupportedParameter,
                "suffix is not served: text can only be continued at its end",
            )
            .at("suffix"));
        }
        let choices = self.prompt.len() * n as usize;
        if choices > CHOICES_TOTAL_MAX {
            let expected = format_args!("such that prompts times n is at most {CHOICES_TOTAL_MAX}");
            return Err(ApiError::value("prompt", expected));
        }
        self.stop.as_ref().map_or(Ok(()), Stop::validate)?;
        validate_top_logprobs("logprobs", self.logprobs)?;
        validate_stream_options(self.stream, self.stream_options.as_ref())
    }
}

/// The answer of `POST /v1/completions`, and one event of its stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Completion {
    pub id: String,
    /// Always `text_completion`.
    pub object: String,
    pub created: u64,
    pub model: String,
    pub system_fingerprint: Option<String>,
    pub choices: Vec<CompletionChoice>,
    /// In a stream only in the last chunk, where `stream_options.include_usage` asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// One answer, or what a chunk adds to it. `index` is `prompt * n + choice`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CompletionChoice {
    pub index: u32,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    pub finish_reason: Option<FinishReason>,
}

/// Log-probabilities, as columns over the tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    /// `null` for the first token of an echoed prompt, which nothing precedes.
    pub token_logprobs: Vec<Option<f32>>,
    /// The best tokens, by their text. Of tokens with the same text the best one is shown.
    #[schema(value_type = Vec<Option<Object>>)]
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Where each token begins in the choice's text, in characters.
    pub text_offset: Vec<u32>,
}

/// Most choices over all prompts of one request.
const CHOICES_TOTAL_MAX: usize = 2048;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn validation_names_the_field() {
        for (extra, param) in [
            (json!({}), None),
            (json!({"prompt": [1, 2], "n": 2, "best_of": 2}), None),
            (json!({"echo": true, "max_tokens": 0, "logprobs": 5}), None),
            (json!({"suffix": ""}), None),
            (json!({"suffix": "end"}), Some("suffix")),
            (json!({"best_of": 2}), Some("best_of")),
            (json!({"max_tokens": 0}), Some("max_tokens")),
            (json!({"prompt": []}), Some("prompt")),
            (json!({"prompt": ""}), Some("prompt")),
            (json!({"prompt": vec!["x"; 100], "n": 100}), Some("prompt")),
            (json!({"logprobs": 21}), Some("logprobs")),
            (json!({"stream_options": {"include_usage": true}}), Some("stream_options")),
        ] {
            let mut body = json!({"model": "m", "prompt": "hi"});
            for (key, value) in extra.as_object().unwrap() {
                body[key] = value.clone();
            }
            let request = serde_json::from_value::<CompletionRequest>(body).unwrap();
            let got = request.validate().err();
            assert_eq!(got.as_ref().and_then(|e| e.param.as_deref()), param, "{extra}: {got:?}");
        }
    }
}
