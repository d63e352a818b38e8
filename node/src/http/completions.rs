//! `POST /v1/completions`: text that goes on.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use engine::replica::{Event, FinishReason, GenerateRequest, PRIORITY_DEFAULT, ScoreRequest};
use engine::sampler::SampledToken;
use protocol::TokenId;
use protocol::api::{
    self, ApiError, Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Stop,
    Usage,
};

use super::error::Failure;
use super::generation::{self, Generation, Update};
use super::guard::Caller;
use super::openapi::{LastEventHeader, Refusals, TimeoutHeader};
use super::sse::{self, Chunks, Frames};
use super::{App, body, embeddings, params};
use crate::ids;
use crate::model::Model;
use crate::replica::Work;

/// Continues each prompt.
#[utoipa::path(post, path = "/v1/completions", tag = "inference",
    params(TimeoutHeader, LastEventHeader), request_body = CompletionRequest,
    responses(
        (status = 200, description = "choices; with `stream`, events", content(
            (Completion = "application/json"), (Completion = "text/event-stream"))),
        Refusals,
    ))]
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request<Body>,
) -> Result<Response, Failure> {
    app.admit()?;
    let request: CompletionRequest = body::read_json(request, &app.limits).await?;
    request.validate()?;
    let model = app.registry.ready(&request.model)?;
    caller.log.model(&model.id);
    let sampling = params::completion_sampling(&request);
    params::check(&sampling, model.vocab)?;
    let prompts = embeddings::tokenize(model.clone(), request.prompt.clone(), "prompt").await?;

    let choices = request.n.unwrap_or(1) as usize;
    let echo = request.echo == Some(true);
    let prefixes = match echo {
        true => echoes(&app, &caller, &model, &request, &prompts).await?,
        false => Vec::new(),
    };
    let writer = Writer {
        id: format!("cmpl-{:032x}", caller.log.id.0),
        created: caller.created,
        model: model.clone(),
        logprobs: request.logprobs.is_some(),
        include_usage: request.stream_options.and_then(|o| o.include_usage) == Some(true),
        prefixes,
        choices_per_prompt: choices,
        offsets: vec![0; prompts.len() * choices],
        pending: vec![None; prompts.len() * choices],
    };
    let max_tokens = request.max_tokens.unwrap_or(MAX_TOKENS_DEFAULT) as usize;
    if max_tokens == 0 {
        if request.stream == Some(true) {
            return Err(ApiError::value("max_tokens", "at least 1 where stream is true").into());
        }
        return Ok(writer.only_echo(&prompts, &caller).into_response());
    }
    let prompt_tokens = prompts.iter().map(Vec::len).sum::<usize>() as u64;
    let stop = request.stop.clone().map(Stop::into_vec).unwrap_or_default();
    let grammar = {
        let spec = params::grammar(request.grammar.as_ref());
        params::compile(&model, spec, "grammar").await?
    };
    let deadline = Some(model.replica.time_of(caller.deadline));
    let parts = prompts.into_iter().enumerate().map(|(i, prompt)| {
        Work::Generate(Box::new(GenerateRequest {
            tenant: caller.tenant.clone(),
            deadline,
            choices,
            sampling: sampling.clone(),
            seed: request.seed,
            max_tokens: Some(max_tokens),
            stop: stop.clone(),
            grammar: grammar.clone(),
            ignore_eos: request.ignore_eos == Some(true),
            priority: request.priority.unwrap_or(PRIORITY_DEFAULT),
            ..GenerateRequest::new(ids::part(caller.log.id, i), prompt)
        }))
    });
    let generation = Generation::start(
        model,
        &caller,
        app.cancel.clone(),
        parts.collect(),
        prompt_tokens,
        choices,
    )
    .await?;
    match request.stream == Some(true) {
        true => Ok(sse::response(generation, writer, app.limits.keep_alive).await?),
        false => Ok(axum::Json(writer.collect(generation).await?).into_response()),
    }
}

/// A prompt as it stands before its answers.
struct Echo {
    text: String,
    logprobs: Option<CompletionLogprobs>,
}

/// Prompts as text, scored if log-probabilities are wanted.
async fn echoes(
    app: &App,
    caller: &Caller,
    model: &Arc<Model>,
    request: &CompletionRequest,
    prompts: &[Vec<TokenId>],
) -> Result<Vec<Echo>, ApiError> {
    let text = |tokens: &Vec<TokenId>| model.tokenizer.decode(tokens, true);
    let Some(top) = request.logprobs else {
        return Ok(prompts.iter().map(|p| Echo { text: text(p), logprobs: None }).collect());
    };
    let parts = prompts.iter().enumerate().map(|(i, prompt)| {
        Work::Score(ScoreRequest {
            request: ids::part(caller.log.id, i),
            tenant: caller.tenant.clone(),
            tokens: prompt.clone(),
            top: top as usize,
            priority: request.priority.unwrap_or(PRIORITY_DEFAULT),
            deadline: Some(model.replica.time_of(caller.deadline)),
        })
    });
    let scores = |event| match event {
        Event::Scores { tokens } => Some(tokens),
        _ => None,
    };
    let scores = generation::answers(model, &app.cancel, parts.collect(), scores).await?;
    Ok(prompts
        .iter()
        .zip(scores)
        .map(|(prompt, scores)| {
            let mut offset = 0;
            let mut columns = CompletionLogprobs::default();
            for (&token, score) in prompt.iter().zip(&scores) {
                push_column(&mut columns, &mut offset, model, token, score.as_ref());
            }
            Echo { text: text(prompt), logprobs: Some(columns) }
        })
        .collect())
}

/// Makes answers and chunks.
struct Writer {
    id: String,
    created: u64,
    model: Arc<Model>,
    logprobs: bool,
    include_usage: bool,
    /// One for each prompt where `echo` is set, else none.
    prefixes: Vec<Echo>,
    choices_per_prompt: usize,
    /// Characters of each choice's tokens so far.
    offsets: Vec<u32>,
    /// Log-probabilities of tokens whose text is still held back.
    pending: Vec<Option<CompletionLogprobs>>,
}

impl Writer {
    fn answer(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> Completion {
        Completion {
            id: self.id.clone(),
            object: "text_completion".to_owned(),
            created: self.created,
            model: self.model.id.clone(),
            system_fingerprint: Some(self.model.fingerprint.clone()),
            choices,
            usage,
        }
    }

    /// What stands in a choice before the first generated token.
    fn opening(&mut self, choice: usize) -> CompletionChoice {
        let echo = self.prefixes.get(choice / self.choices_per_prompt);
        let logprobs = echo.and_then(|e| e.logprobs.clone());
        self.offsets[choice] =
            logprobs.iter().flat_map(|l| &l.tokens).map(|t| t.chars().count() as u32).sum();
        CompletionChoice {
            index: choice as u32,
            text: echo.map(|e| e.text.clone()).unwrap_or_default(),
            logprobs: logprobs.or(self.logprobs.then(CompletionLogprobs::default)),
            finish_reason: None,
        }
    }

    /// What an update adds to its choice; `None` where nothing can be shown yet.
    fn piece(&mut self, update: Update) -> Option<CompletionChoice> {
        let (choice, text, finish_reason) = match update {
            Update::Token { choice, sampled, text } => {
                if self.logprobs {
                    let columns = self.pending[choice].get_or_insert_default();
                    let offset = &mut self.offsets[choice];
                    push_column(columns, offset, &self.model, sampled.token, Some(&sampled));
                }
                if text.is_empty() {
                    return None;
                }
                (choice, text, None)
            }
            Update::Finished { choice, reason, text } => (choice, text, Some(finish(reason))),
            Update::Failed(_) => return None,
        };
        let logprobs = self.pending[choice].take();
        Some(CompletionChoice { index: choice as u32, text, logprobs, finish_reason })
    }

    async fn collect(mut self, mut generation: Generation) -> Result<Completion, ApiError> {
        let count = generation.choice_count();
        let mut choices: Vec<_> = (0..count).map(|choice| self.opening(choice)).collect();
        while let Some(update) = generation.next().await {
            if let Update::Failed(error) = update {
                return Err(error);
            }
            let Some(piece) = self.piece(update) else { continue };
            let choice = &mut choices[piece.index as usize];
            choice.text.push_str(&piece.text);
            choice.finish_reason = choice.finish_reason.or(piece.finish_reason);
            if let (Some(all), Some(new)) = (&mut choice.logprobs, piece.logprobs) {
                all.tokens.extend(new.tokens);
                all.token_logprobs.extend(new.token_logprobs);
                all.top_logprobs.extend(new.top_logprobs);
                all.text_offset.extend(new.text_offset);
            }
        }
        Ok(self.answer(choices, Some(generation.usage())))
    }

    /// The answer where nothing is to be generated.
    fn only_echo(mut self, prompts: &[Vec<TokenId>], caller: &Caller) -> axum::Json<Completion> {
        let tokens = prompts.iter().map(Vec::len).sum::<usize>() as u64;
        caller.log.tokens(tokens, 0, 0);
        let choices = (0..self.offsets.len()).map(|choice| CompletionChoice {
            finish_reason: Some(api::FinishReason::Length),
            ..self.opening(choice)
        });
        let choices = choices.collect();
        axum::Json(self.answer(choices, Some(Usage::new(tokens, 0, 0))))
    }
}

impl Chunks for Writer {
    fn open(&mut self, out: &mut Frames) {
        if self.prefixes.is_empty() {
            return;
        }
        for choice in 0..self.offsets.len() {
            let opening = self.opening(choice);
            out.push(&self.answer(vec![opening], None));
        }
    }

    fn update(&mut self, update: Update, out: &mut Frames) {
        if let Some(piece) = self.piece(update) {
            out.push(&self.answer(vec![piece], None));
        }
    }

    fn close(&mut self, generation: &Generation, out: &mut Frames) {
        if self.include_usage {
            out.push(&self.answer(Vec::new(), Some(generation.usage())));
        }
    }
}

fn finish(reason: FinishReason) -> api::FinishReason {
    match reason {
        FinishReason::Stop => api::FinishReason::Stop,
        FinishReason::Length => api::FinishReason::Length,
    }
}

fn push_column(
    columns: &mut CompletionLogprobs,
    offset: &mut u32,
    model: &Model,
    token: TokenId,
    score: Option<&SampledToken>,
) {
    let text = model.token_text(token);
    columns.text_offset.push(*offset);
    *offset += text.chars().count() as u32;
    columns.tokens.push(text);
    columns.token_logprobs.push(score.map(|s| params::finite(s.logprob)));
    columns.top_logprobs.push(score.map(|s| {
        let mut best = BTreeMap::new();
        for &(token, logprob) in &s.top {
            best.entry(model.token_text(token)).or_insert(params::finite(logprob));
        }
        best
    }));
}

/// OpenAI's default for this endpoint.
const MAX_TOKENS_DEFAULT: u32 = 16;
