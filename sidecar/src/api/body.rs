//! Takes a request's body in, within bounds of size, time and memory, before any handler sees it.
//!
//! A body that is too long is still read (and thrown away) up to a point, because a client that is busy sending would otherwise see a
//! broken connection in place of the answer.

use std::future::poll_fn;
use std::pin::Pin;

use axum::body::{Body, Bytes, HttpBody};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::ApiLimits;
use super::error::ApiError;

/// Reads the whole body.
///
/// # Errors
/// [`ApiError::TooLarge`], [`ApiError::SlowBody`], [`ApiError::BrokenBody`], [`ApiError::LargeBodiesBusy`].
pub(super) async fn read(
    body: Body,
    limits: &ApiLimits,
    large: &Semaphore,
) -> Result<Bytes, ApiError> {
    let reading = read_within(body, limits, large);
    timeout(limits.body_timeout, reading)
        .await
        .unwrap_or(Err(ApiError::SlowBody))
}

async fn read_within(
    mut body: Body,
    limits: &ApiLimits,
    large: &Semaphore,
) -> Result<Bytes, ApiError> {
    let mut kept: Vec<u8> = Vec::new();
    let mut permit = None;
    while let Some(data) = next(&mut body).await? {
        let length = kept.len().saturating_add(data.len());
        if length > limits.body_bytes_max {
            drop(kept);
            discard(body, limits).await?;
            return Err(ApiError::TooLarge {
                limit: limits.body_bytes_max,
            });
        }
        if length > limits.small_body_bytes && permit.is_none() {
            match large.try_acquire() {
                Ok(taken) => permit = Some(taken),
                Err(_) => {
                    drop(kept);
                    discard(body, limits).await?;
                    return Err(ApiError::LargeBodiesBusy);
                }
            }
        }
        kept.extend_from_slice(&data);
    }
    Ok(Bytes::from(kept))
}

/// The next piece of data; trailers are passed over.
async fn next(body: &mut Body) -> Result<Option<Bytes>, ApiError> {
    loop {
        match poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await {
            None => return Ok(None),
            Some(Err(_)) => return Err(ApiError::BrokenBody),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

async fn discard(mut body: Body, limits: &ApiLimits) -> Result<(), ApiError> {
    let mut seen = 0_usize;
    while seen < limits.discard_bytes_max {
        match next(&mut body).await? {
            Some(data) => seen = seen.saturating_add(data.len()),
            None => break,
        }
    }
    Ok(())
}
