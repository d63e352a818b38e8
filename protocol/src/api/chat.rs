//! `/v1/chat/completions`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::sampling::{
    validate_choices, validate_format, validate_stream_options, validate_top_logprobs,
};
use super::{
    ApiError, FinishReason, Grammar, MESSAGES_MAX, Message, ResponseFormat, Role, Stop,
    StreamOptions, Tool, ToolCall, ToolCallDelta, ToolChoice, Usage, tool,
};
use crate::TokenId;

/// The body of `POST /v1/chat/completions`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatRequest {
    pub model: String,
    pub messages: Vec<Message>,
    /// Most tokens of each choice. The older name of `max_completion_tokens`, which wins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
    /// Most tokens of each choice; absent means until the context is full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<u32>,
    /// Choices to generate, 1 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<u32>,
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
    /// The same seed, request and model give the same answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_format: Option<ResponseFormat>,
    /// Extension: the answer must match this grammar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grammar: Option<Grammar>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Vec<Tool>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_choice: Option<ToolChoice>,
    /// Whether one answer may call several tools; true if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parallel_tool_calls: Option<bool>,
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
    /// Extension: variables for the chat template, such as `enable_thinking`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<serde_json::Map<String, serde_json::Value>>,
}

impl ChatRequest {
    /// Checks what needs no model. Ranges of sampling parameters are the sampler's to check.
    pub fn validate(&self) -> Result<(), ApiError> {
        if !(1..=MESSAGES_MAX).contains(&self.messages.len()) {
            let expected = format_args!("an array of 1 to {MESSAGES_MAX} messages");
            return Err(ApiError::value("messages", expected));
        }
        for (i, message) in self.messages.iter().enumerate() {
            message.validate(i)?;
        }
        if self.max_tokens == Some(0) {
            return Err(ApiError::value("max_tokens", "at least 1"));
        }
        if self.max_completion_tokens == Some(0) {
            return Err(ApiError::value("max_completion_tokens", "at least 1"));
        }
        validate_choices(self.n)?;
        self.stop.as_ref().map_or(Ok(()), Stop::validate)?;
        if self.top_logprobs.is_some() && self.logprobs != Some(true) {
            return Err(ApiError::value("top_logprobs", "absent where logprobs is not true"));
        }
        validate_top_logprobs("top_logprobs", self.top_logprobs)?;
        validate_format(self.response_format.as_ref(), self.grammar.as_ref())?;
        tool::validate(self.tools.as_deref().unwrap_or_default(), self.tool_choice.as_ref())?;
        validate_stream_options(self.stream, self.stream_options.as_ref())
    }
}

/// The answer of `POST /v1/chat/completions`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatCompletion {
    pub id: String,
    /// Always `chat.completion`.
    pub object: String,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
    /// Names weights and numerics: answers with the same seed can be compared where it is equal.
    pub system_fingerprint: Option<String>,
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatChoice {
    pub index: u32,
    pub message: ChatMessageOut,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: FinishReason,
}

/// What the model said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatMessageOut {
    /// Always `assistant`.
    pub role: Role,
    /// `null` where the answer is nothing but tool calls.
    pub content: Option<String>,
    /// Always `null`.
    pub refusal: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCall>>,
}

/// Log-probabilities of the tokens of a message.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatLogprobs {
    pub content: Vec<TokenLogprob>,
    /// Always `null`.
    pub refusal: Option<Vec<TokenLogprob>>,
}

/// One token and how probable it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TokenLogprob {
    pub token: String,
    pub logprob: f32,
    /// The token's bytes: a character may need several tokens.
    pub bytes: Option<Vec<u8>>,
    pub top_logprobs: Vec<TopLogprob>,
}

/// An alternative.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TopLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Option<Vec<u8>>,
}

/// One event of a streamed chat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatChunk {
    pub id: String,
    /// Always `chat.completion.chunk`.
    pub object: String,
    pub created: u64,
    pub model: String,
    pub system_fingerprint: Option<String>,
    pub choices: Vec<ChatChunkChoice>,
    /// In the last chunk, where `stream_options.include_usage` asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// What a chunk adds to one choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChatChunkChoice {
    pub index: u32,
    pub delta: Delta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<FinishReason>,
}

/// A piece of a message.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Delta {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCallDelta>>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// A chat with `extra` laid over its fields.
    fn validate(extra: Value) -> Result<(), ApiError> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        serde_json::from_value::<ChatRequest>(body).unwrap().validate()
    }

    #[test]
    fn good_requests() {
        let tool = json!({"type": "function", "function": {"name": "f"}});
        for extra in [
            json!({}),
            json!({"temperature": null, "n": null, "stop": null}),
            json!({"invented": {"field": 1}}),
            json!({"stop": ["a"], "n": 2, "logprobs": true, "top_logprobs": 0}),
            json!({"tools": [tool.clone()], "tool_choice": "auto"}),
            json!({"tools": [tool.clone()],
                   "tool_choice": {"type": "function", "function": {"name": "f"}}}),
            json!({"tool_choice": "none"}),
            json!({"response_format": {"type": "json_schema",
                   "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": true}}}),
            json!({"grammar": {"type": "regex", "value": "[a-z]+"}}),
            json!({"stream": true, "stream_options": {"include_usage": true}}),
            json!({"messages": [
                {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
                {"role": "user", "content": "weather?"},
                {"role": "assistant", "content": null, "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "c", "content": "rain"},
            ]}),
        ] {
            assert_eq!(validate(extra.clone()), Ok(()), "{extra}");
        }
    }

    #[test]
    fn bad_requests_name_the_field() {
        let tool = json!({"type": "function", "function": {"name": "f"}});
        for (extra, param) in [
            (json!({"messages": []}), "messages"),
            (json!({"n": 0}), "n"),
            (json!({"n": 129}), "n"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
            (json!({"stop": ""}), "stop"),
            (json!({"top_logprobs": 3}), "top_logprobs"),
            (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
            (json!({"stream_options": {}}), "stream_options"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": [tool.clone(), tool.clone()]}), "tools[1].function.name"),
            (
                json!({"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
                "tool_choice.function.name",
            ),
            (
                json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}),
                "tools[0].function.name",
            ),
            (
                json!({"tools": [{"type": "function", "function": {"name": "a", "parameters": 3}}]}),
                "tools[0].function.parameters",
            ),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
            (
                json!({"response_format": {"type": "json_schema",
                    "json_schema": {"name": "s", "schema": 1}}}),
                "response_format.json_schema.schema",
            ),
            (
                json!({"response_format": {"type": "json_object"},
                    "grammar": {"type": "lark", "value": "start: \"a\""}}),
                "grammar",
            ),
            (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
            (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].tool_call_id"),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
                "messages[0].content[0].type",
            ),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
                "messages[0].content[0].text",
            ),
        ] {
            let error = validate(extra.clone()).expect_err(&extra.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{extra}: {error}");
            assert_eq!(error.code.status(), 400, "{extra}");
        }
    }
}
