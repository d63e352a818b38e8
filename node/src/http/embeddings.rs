//! `POST /v1/embeddings`: the mean of the last hidden states of a text, of length 1.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use engine::replica::{EmbedRequest, Event, PRIORITY_DEFAULT, Pooling};
use protocol::TokenId;
use protocol::api::{
    ApiError, Embedding, EmbeddingData, EmbeddingList, EmbeddingRequest, EmbeddingUsage,
    EncodingFormat, ErrorCode, Input,
};

use super::error::Failure;
use super::generation;
use super::guard::Caller;
use super::openapi::{Refusals, TimeoutHeader};
use super::{App, body};
use crate::ids;
use crate::model::Model;
use crate::replica::Work;

/// One vector for each text.
#[utoipa::path(post, path = "/v1/embeddings", tag = "inference", params(TimeoutHeader),
    request_body = EmbeddingRequest,
    responses(
        (status = 200, description = "vectors, in the order of the texts", body = EmbeddingList),
        Refusals,
    ))]
pub(crate) async fn embeddings(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request<Body>,
) -> Result<Response, Failure> {
    app.admit()?;
    let request: EmbeddingRequest = body::read_json(request, &app.limits).await?;
    request.validate()?;
    let model = app.registry.ready(&request.model)?;
    caller.log.model(&model.id);
    if request.dimensions.is_some_and(|d| d as usize != model.hidden) {
        let expected = format_args!("{}, which this model has, or absent", model.hidden);
        return Err(ApiError::value("dimensions", expected).into());
    }
    let EmbeddingRequest { input, encoding_format, priority, .. } = request;
    let texts = tokenize(model.clone(), input, "input").await?;
    let prompt_tokens: usize = texts.iter().map(Vec::len).sum();
    let parts = texts.into_iter().enumerate().map(|(i, tokens)| {
        Work::Embed(EmbedRequest {
            request: ids::part(caller.log.id, i),
            tenant: caller.tenant.clone(),
            tokens,
            pooling: Pooling::Mean,
            priority: priority.unwrap_or(PRIORITY_DEFAULT),
            deadline: Some(model.replica.time_of(caller.deadline)),
        })
    });
    let vectors = |event| match event {
        Event::Embedding { vector } => Some(vector),
        _ => None,
    };
    let vectors = generation::answers(&model, &app.cancel, parts.collect(), vectors).await?;
    caller.log.tokens(prompt_tokens as u64, 0, 0);
    model.metrics.input_tokens.record(prompt_tokens as f64);
    let format = encoding_format.unwrap_or_default();
    let data = vectors.into_iter().enumerate().map(|(i, vector)| Embedding {
        object: "embedding".to_owned(),
        index: i as u32,
        embedding: match format {
            EncodingFormat::Float => EmbeddingData::Float(vector),
            EncodingFormat::Base64 => EmbeddingData::Base64(base64_f32(&vector)),
        },
    });
    let list = EmbeddingList {
        object: "list".to_owned(),
        data: data.collect(),
        model: model.id.clone(),
        usage: EmbeddingUsage {
            prompt_tokens: prompt_tokens as u64,
            total_tokens: prompt_tokens as u64,
        },
    };
    Ok(axum::Json(list).into_response())
}

/// Texts as tokens. Runs off the async threads: long texts take many milliseconds.
pub(crate) async fn tokenize(
    model: Arc<Model>,
    input: Input,
    param: &'static str,
) -> Result<Vec<Vec<TokenId>>, ApiError> {
    let texts = match input {
        Input::Tokens(tokens) => return Ok(vec![tokens]),
        Input::TokenLists(lists) => return Ok(lists),
        Input::Text(text) => vec![text],
        Input::Texts(texts) => texts,
    };
    let encode = move || {
        let encode = |text: &String| model.tokenizer.encode(text, true);
        texts.iter().map(encode).collect::<Result<Vec<_>, _>>()
    };
    match tokio::task::spawn_blocking(encode).await {
        Ok(Ok(lists)) => Ok(lists),
        Ok(Err(error)) => Err(ApiError::new(ErrorCode::InvalidValue, error.to_string()).at(param)),
        Err(_) => Err(ApiError::new(ErrorCode::InternalError, "the tokenizer failed on this text")),
    }
}

/// Base64 (RFC 4648, section 4) of the little-endian bytes.
fn base64_f32(vector: &[f32]) -> String {
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0u32, |group, &b| group << 8 | u32::from(b));
        let group = group << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = (group >> (18 - 6 * i) & 63) as usize;
            text.push(if i <= chunk.len() { BASE64[digit] as char } else { '=' });
        }
    }
    text
}

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_vectors() {
        for (vector, expect) in [
            (&[][..], ""),
            (&[1.0][..], "AACAPw=="),
            (&[1.0, -2.5][..], "AACAPwAAIMA="),
            (&[0.0, 1.0, 2.0][..], "AAAAAAAAgD8AAABA"),
        ] {
            assert_eq!(base64_f32(vector), expect);
        }
    }
}
