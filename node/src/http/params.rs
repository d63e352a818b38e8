//! Fields of a request as the sampler and the grammar want them.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::grammar::{Grammar as CompiledGrammar, GrammarSpec};
use engine::sampler::SamplingParams;
use protocol::TokenId;
use protocol::api::{
    ApiError, ChatRequest, CompletionRequest, ErrorCode, Grammar, GrammarSyntax, ResponseFormat,
    ResponseFormatType,
};

use crate::model::Model;

pub(crate) fn chat_sampling(request: &ChatRequest) -> SamplingParams {
    let logprobs = request.logprobs == Some(true);
    SamplingParams {
        temperature: request.temperature.unwrap_or(TEMPERATURE_DEFAULT),
        top_k: request.top_k.unwrap_or(0) as usize,
        top_p: request.top_p.unwrap_or(1.0),
        min_p: request.min_p.unwrap_or(0.0),
        repetition_penalty: request.repetition_penalty.unwrap_or(1.0),
        presence_penalty: request.presence_penalty.unwrap_or(0.0),
        frequency_penalty: request.frequency_penalty.unwrap_or(0.0),
        logit_bias: bias(request.logit_bias.as_ref()),
        logprobs: logprobs.then(|| request.top_logprobs.unwrap_or(0) as usize),
    }
}

pub(crate) fn completion_sampling(request: &CompletionRequest) -> SamplingParams {
    SamplingParams {
        temperature: request.temperature.unwrap_or(TEMPERATURE_DEFAULT),
        top_k: request.top_k.unwrap_or(0) as usize,
        top_p: request.top_p.unwrap_or(1.0),
        min_p: request.min_p.unwrap_or(0.0),
        repetition_penalty: request.repetition_penalty.unwrap_or(1.0),
        presence_penalty: request.presence_penalty.unwrap_or(0.0),
        frequency_penalty: request.frequency_penalty.unwrap_or(0.0),
        logit_bias: bias(request.logit_bias.as_ref()),
        logprobs: request.logprobs.map(|top| top as usize),
    }
}

/// Refuses what the sampler would refuse, before any other work is done.
pub(crate) fn check(sampling: &SamplingParams, vocab: usize) -> Result<(), ApiError> {
    sampling
        .validate(vocab)
        .map_err(|error| ApiError::new(ErrorCode::InvalidValue, error.to_string()).at(error.field))
}

/// Compiles what an answer must be, off the async threads; `param` is the field that asked for it.
pub(crate) async fn compile(
    model: &Arc<Model>,
    spec: Option<GrammarSpec>,
    param: &'static str,
) -> Result<Option<CompiledGrammar>, ApiError> {
    let Some(spec) = spec else { return Ok(None) };
    let model = model.clone();
    let compile = move || model.grammars.as_ref().map(|grammars| grammars.compile(&spec));
    match tokio::task::spawn_blocking(compile).await {
        Ok(Some(Ok(grammar))) => Ok(Some(grammar)),
        Ok(None) => {
            let message = format!("{param}: no text of this model can end, so it has no grammars");
            Err(ApiError::new(ErrorCode::UnsupportedParameter, message).at(param))
        }
        Ok(Some(Err(error))) => {
            let message = format!("{param}: {error}");
            Err(ApiError::new(ErrorCode::InvalidGrammar, message).at(param))
        }
        Err(_) => {
            let message = format!("{param}: its compilation failed");
            Err(ApiError::new(ErrorCode::InternalError, message).at(param))
        }
    }
}

/// A log-probability as JSON can say it: minus infinity becomes [`LOGPROB_MIN`].
pub(crate) fn finite(logprob: f32) -> f32 {
    logprob.max(LOGPROB_MIN)
}

fn bias(map: Option<&BTreeMap<TokenId, f32>>) -> Vec<(TokenId, f32)> {
    map.map(|map| map.iter().map(|(&token, &bias)| (token, bias)).collect()).unwrap_or_default()
}

/// The extension `grammar`.
pub(crate) fn grammar(grammar: Option<&Grammar>) -> Option<GrammarSpec> {
    grammar.map(|g| match g.kind {
        GrammarSyntax::Lark => GrammarSpec::Lark(g.value.clone()),
        GrammarSyntax::Regex => GrammarSpec::Regex(g.value.clone()),
    })
}

/// `response_format`, already validated.
pub(crate) fn response_format(format: Option<&ResponseFormat>) -> Option<GrammarSpec> {
    let format = format?;
    match (format.kind, &format.json_schema) {
        (ResponseFormatType::Text, _) => None,
        (ResponseFormatType::JsonSchema, Some(s)) => {
            Some(GrammarSpec::JsonSchema(s.schema.clone()))
        }
        (ResponseFormatType::JsonObject | ResponseFormatType::JsonSchema, _) => {
            Some(GrammarSpec::JsonObject)
        }
    }
}

/// OpenAI's default where a request says nothing.
const TEMPERATURE_DEFAULT: f32 = 1.0;
/// What OpenAI reports for tokens that cannot be.
const LOGPROB_MIN: f32 = -9999.0;
