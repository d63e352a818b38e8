//! `POST /v1/chat/completions`: messages to a prompt, tokens to a message.
//!
//! An answer that is not streamed is the sum of the pieces that a stream would have sent.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use engine::chat::{Calendar, ChatInput, TemplateError};
use engine::grammar::GrammarSpec;
use engine::replica::{FinishReason, GenerateRequest, PRIORITY_DEFAULT};
use engine::sampler::SampledToken;
use protocol::TokenId;
use protocol::api::{
    self, ApiError, CalledFunction, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion,
    ChatLogprobs, ChatMessageOut, ChatRequest, Delta, ErrorCode, Role, Stop, TokenLogprob,
    ToolCall, ToolCallDelta, TopLogprob, Usage,
};
use serde_json::Value;

use super::error::Failure;
use super::generation::{Generation, Update};
use super::guard::Caller;
use super::openapi::{LastEventHeader, Refusals, TimeoutHeader};
use super::sse::{self, Chunks, Frames};
use super::{App, body, params, tools};
use crate::model::Model;
use crate::replica::Work;

/// Answers a chat.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "inference",
    params(TimeoutHeader, LastEventHeader), request_body = ChatRequest,
    responses(
        (status = 200, description = "choices; with `stream`, events", content(
            (ChatCompletion = "application/json"), (ChatChunk = "text/event-stream"))),
        Refusals,
    ))]
pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request<Body>,
) -> Result<Response, Failure> {
    app.admit()?;
    let request: ChatRequest = body::read_json(request, &app.limits).await?;
    request.validate()?;
    let model = app.registry.ready(&request.model)?;
    caller.log.model(&model.id);
    let sampling = params::chat_sampling(&request);
    params::check(&sampling, model.vocab)?;

    let request = Arc::new(request);
    let prompt = prompt(model.clone(), request.clone(), caller.created).await?;
    let prompt_tokens = prompt.len() as u64;
    let choices = request.n.unwrap_or(1) as usize;
    let max_tokens = request.max_completion_tokens.or(request.max_tokens);
    let tools = tools::Offer::new(&request, &model)?;
    let (spec, param) = match &tools {
        Some(tools::Offer { must_call: Some(calls), .. }) => {
            (Some(GrammarSpec::ToolCalls(calls.clone())), "tools")
        }
        _ => match params::grammar(request.grammar.as_ref()) {
            None => (params::response_format(request.response_format.as_ref()), "response_format"),
            spec => (spec, "grammar"),
        },
    };
    let grammar = params::compile(&model, spec, param).await?;
    let work = GenerateRequest {
        tenant: caller.tenant.clone(),
        deadline: Some(model.replica.time_of(caller.deadline)),
        choices,
        sampling,
        seed: request.seed,
        max_tokens: max_tokens.map(|n| n as usize),
        stop: request.stop.clone().map(Stop::into_vec).unwrap_or_default(),
        grammar,
        visible_specials: tools.as_ref().map(|t| t.visible_specials(&model)).unwrap_or_default(),
        priority: request.priority.unwrap_or(PRIORITY_DEFAULT),
        ..GenerateRequest::new(caller.log.id, prompt)
    };
    let writer = Writer::new(&request, &caller, model.clone(), tools.as_ref());
    let generation = Generation::start(
        model,
        &caller,
        app.cancel.clone(),
        vec![Work::Generate(Box::new(work))],
        prompt_tokens,
        choices,
    )
    .await
    .map_err(|error| match error.code {
        ErrorCode::ContextLengthExceeded => error.at("messages"),
        _ => error,
    })?;
    match request.stream == Some(true) {
        true => Ok(sse::response(generation, writer, app.limits.keep_alive).await?),
        false => Ok(axum::Json(writer.collect(generation).await?).into_response()),
    }
}

/// Renders the template. Off the async threads: long chats take many milliseconds.
pub(super) async fn prompt(
    model: Arc<Model>,
    request: Arc<ChatRequest>,
    created: u64,
) -> Result<Vec<TokenId>, ApiError> {
    let render = move || {
        let Some(template) = &model.template else {
            let message = format!("model {} has no chat template: use /v1/completions", model.id);
            return Err(ApiError::new(ErrorCode::UnsupportedParameter, message).at("messages"));
        };
        let messages: Vec<Value> = request.messages.iter().map(as_template_message).collect();
        let tools: Vec<Value> = match tools::are_offered(&request) {
            true => request.tools.iter().flatten().filter_map(to_value).collect(),
            false => Vec::new(),
        };
        let variables = request.chat_template_kwargs.clone().unwrap_or_default();
        let input = ChatInput {
            messages: &messages,
            tools: &tools,
            documents: &[],
            add_generation_prompt: true,
            variables: &variables,
            now: Calendar::from_unix_s(created as i64),
        };
        let prompt = template.render(&model.tokenizer, &input);
        prompt.map(|prompt| prompt.tokens).map_err(template_error)
    };
    tokio::task::spawn_blocking(render).await.unwrap_or_else(|_| {
        let message = "the chat template failed on these messages";
        Err(ApiError::new(ErrorCode::InternalError, message))
    })
}

/// Templates know `system`, few know its newer name.
fn as_template_message(message: &api::Message) -> Value {
    let mut value = to_value(message).unwrap_or_default();
    if message.role == Role::Developer {
        value["role"] = "system".into();
    }
    value
}

fn to_value(value: &impl serde::Serialize) -> Option<Value> {
    serde_json::to_value(value).ok()
}

fn template_error(error: TemplateError) -> ApiError {
    let code = match error {
        TemplateError::Syntax { .. } => ErrorCode::InternalError,
        _ => ErrorCode::InvalidValue,
    };
    ApiError::new(code, error.to_string()).at("messages")
}

/// Makes answers and chunks.
struct Writer {
    id: String,
    created: u64,
    model: Arc<Model>,
    logprobs: bool,
    include_usage: bool,
    choices: Vec<Choice>,
}

/// What a choice still holds back.
struct Choice {
    logprobs: Vec<TokenLogprob>,
    /// Where tools are on offer.
    calls: Option<tools::Calls>,
}

impl Writer {
    fn new(
        request: &ChatRequest,
        caller: &Caller,
        model: Arc<Model>,
        tools: Option<&tools::Offer>,
    ) -> Writer {
        let choice = |i: u32| Choice {
            logprobs: Vec::new(),
            calls: tools.map(|tools| tools.calls(&model, caller.log.id, i)),
        };
        Writer {
            id: format!("chatcmpl-{:032x}", caller.log.id.0),
            created: caller.created,
            logprobs: request.logprobs == Some(true),
            include_usage: request.stream_options.and_then(|o| o.include_usage) == Some(true),
            choices: (0..request.n.unwrap_or(1)).map(choice).collect(),
            model,
        }
    }

    /// What an update adds to its choice; `None` where nothing can be shown yet.
    fn piece(&mut self, update: Update) -> Option<ChatChunkChoice> {
        let (index, text, reason) = match update {
            Update::Token { choice, sampled, text } => {
                if self.logprobs {
                    let logprob = token_logprob(&self.model, &sampled);
                    self.choices[choice].logprobs.push(logprob);
                }
                (choice, text, None)
            }
            Update::Finished { choice, reason, text } => (choice, text, Some(reason)),
            Update::Failed(_) => return None,
        };
        let choice = &mut self.choices[index];
        let mut delta = match &mut choice.calls {
            Some(calls) => calls.push(&text, reason.is_some()),
            None => Delta { content: Some(text), ..Delta::default() },
        };
        delta.content = delta.content.filter(|text| !text.is_empty());
        if delta == Delta::default() && reason.is_none() {
            return None;
        }
        let called = choice.calls.as_ref().is_some_and(tools::Calls::any);
        let logprobs = std::mem::take(&mut choice.logprobs);
        let shown = self.logprobs && !(logprobs.is_empty() && reason.is_some());
        Some(ChatChunkChoice {
            index: index as u32,
            delta,
            logprobs: shown.then_some(ChatLogprobs { content: logprobs, refusal: None }),
            finish_reason: reason.map(|reason| finish(reason, called)),
        })
    }

    fn chunk(&self, choices: Vec<ChatChunkChoice>, usage: Option<Usage>) -> ChatChunk {
        ChatChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk".to_owned(),
            created: self.created,
            model: self.model.id.clone(),
            system_fingerprint: Some(self.model.fingerprint.clone()),
            choices,
            usage,
        }
    }

    async fn collect(mut self, mut generation: Generation) -> Result<ChatCompletion, ApiError> {
        let mut choices: Vec<ChatChoice> =
            (0..self.choices.len()).map(|i| empty_choice(i, self.logprobs)).collect();
        while let Some(update) = generation.next().await {
            if let Update::Failed(error) = update {
                return Err(error);
            }
            if let Some(piece) = self.piece(update) {
                append(&mut choices[piece.index as usize], piece);
            }
        }
        for choice in &mut choices {
            // OpenAI says null where there are nothing but calls, an empty text where there is nothing.
            if choice.message.tool_calls.is_none() {
                choice.message.content.get_or_insert_default();
            }
        }
        Ok(ChatCompletion {
            id: self.id,
            object: "chat.completion".to_owned(),
            created: self.created,
            model: self.model.id.clone(),
            choices,
            usage: generation.usage(),
            system_fingerprint: Some(self.model.fingerprint.clone()),
        })
    }
}

impl Chunks for Writer {
    fn open(&mut self, out: &mut Frames) {
        for index in 0..self.choices.len() {
            let delta = Delta {
                role: Some(Role::Assistant),
                content: Some(String::new()),
                tool_calls: None,
            };
            let choice =
                ChatChunkChoice { index: index as u32, delta, logprobs: None, finish_reason: None };
            out.push(&self.chunk(vec![choice], None));
        }
    }

    fn update(&mut self, update: Update, out: &mut Frames) {
        if let Some(piece) = self.piece(update) {
            out.push(&self.chunk(vec![piece], None));
        }
    }

    fn close(&mut self, generation: &Generation, out: &mut Frames) {
        if self.include_usage {
            out.push(&self.chunk(Vec::new(), Some(generation.usage())));
        }
    }
}

fn empty_choice(index: usize, logprobs: bool) -> ChatChoice {
    ChatChoice {
        index: index as u32,
        message: ChatMessageOut {
            role: Role::Assistant,
            content: None,
            refusal: None,
            tool_calls: None,
        },
        logprobs: logprobs.then(ChatLogprobs::default),
        finish_reason: api::FinishReason::Stop,
    }
}

/// Adds a piece of a stream to a whole answer.
fn append(choice: &mut ChatChoice, piece: ChatChunkChoice) {
    if let Some(text) = piece.delta.content {
        choice.message.content.get_or_insert_default().push_str(&text);
    }
    for delta in piece.delta.tool_calls.into_iter().flatten() {
        append_call(choice.message.tool_calls.get_or_insert_default(), delta);
    }
    if let (Some(all), Some(new)) = (&mut choice.logprobs, piece.logprobs) {
        all.content.extend(new.content);
    }
    if let Some(reason) = piece.finish_reason {
        choice.finish_reason = reason;
    }
}

fn append_call(calls: &mut Vec<ToolCall>, delta: ToolCallDelta) {
    if let (Some(id), Some(name)) = (delta.id, delta.function.name) {
        let function = CalledFunction { name, arguments: String::new() };
        calls.push(ToolCall { id, kind: api::ToolType::Function, function });
    }
    if let (Some(call), Some(text)) =
        (calls.get_mut(delta.index as usize), delta.function.arguments)
    {
        call.function.arguments.push_str(&text);
    }
}

fn finish(reason: FinishReason, called: bool) -> api::FinishReason {
    match reason {
        FinishReason::Stop if called => api::FinishReason::ToolCalls,
        FinishReason::Stop => api::FinishReason::Stop,
        FinishReason::Length => api::FinishReason::Length,
    }
}

fn token_logprob(model: &Model, sampled: &SampledToken) -> TokenLogprob {
    let bytes = |token| Some(model.tokenizer.token_bytes(token).to_vec());
    let top = |&(token, logprob): &(TokenId, f32)| TopLogprob {
        token: model.token_text(token),
        logprob: params::finite(logprob),
        bytes: bytes(token),
    };
    TokenLogprob {
        token: model.token_text(sampled.token),
        logprob: params::finite(sampled.logprob),
        bytes: bytes(sampled.token),
        top_logprobs: sampled.top.iter().map(top).collect(),
    }
}
