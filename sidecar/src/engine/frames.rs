//! The engine protocol's frames: header, messages, encoding. Pure: no sockets here.
//!
//! A frame is a [`Header`] (24 bytes, little-endian) and a body of at most [`BODY_MAX`] bytes, which is one message in
//! postcard encoding. An engine's messages are numbered upwards. A reply carries the number of the message it answers; a
//! push carries 0, and wants have numbers of their own, which rise too ([`Rising`]).
//! Whatever does not decode to the last byte is refused: the peer is then disconnected, nothing else is affected.

use bytemuck::{Pod, Zeroable};
use kvstore::BlockHash;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};

/// Version of the protocol; both ends must agree.
pub const PROTOCOL: u16 = 2;
/// First four bytes of every frame ("GRM" and the header's own version).
pub const MAGIC: u32 = u32::from_le_bytes(*b"GRM1");
/// Largest body in bytes: a chain of 100,000 block hashes fits.
pub const BODY_MAX: usize = 4 << 20;
/// Bytes of a header.
pub const HEADER_BYTES: usize = size_of::<Header>();

/// Head of every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Header {
    magic: u32,
    version: u16,
    reserved: u16,
    body_bytes: u32,
    padding: u32,
    sequence: u64,
}

const _: () = assert!(HEADER_BYTES == 24);

/// Why a frame was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not this protocol at all.
    #[error("the peer does not speak the Greenroom engine protocol")]
    NotOurs,
    /// The other end is of another release.
    #[error(
        "protocol version {0}, this end speaks {PROTOCOL}: install the same Greenroom release on both ends"
    )]
    Version(u16),
    /// Larger than [`BODY_MAX`].
    #[error("frame body of {0} bytes, the limit is {BODY_MAX}")]
    TooLarge(usize),
    /// The body is not one whole message.
    #[error("frame body does not decode")]
    Malformed,
    /// It came twice, or after a later one.
    #[error("frame {0} came twice or out of order")]
    OutOfOrder(u64),
}

/// Numbers of what arrives over one connection: they rise. A frame that comes twice, or after a later one, ends the
/// connection before anybody acts on it: its lease may have been given back, or be in use.
#[derive(Debug, Default)]
pub struct Rising(u64);

impl Rising {
    /// Takes the next number.
    ///
    /// # Errors
    /// [`FrameError::OutOfOrder`] unless it is above all before it.
    pub fn take(&mut self, number: u64) -> Result<(), FrameError> {
        if number <= self.0 {
            return Err(FrameError::OutOfOrder(number));
        }
        self.0 = number;
        Ok(())
    }
}

impl Header {
    /// Checks a received header; returns (body bytes, sequence).
    ///
    /// # Errors
    /// [`FrameError`] unless it is ours, of our version and within the size limit.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<(usize, u64), FrameError> {
        let header: Self = bytemuck::pod_read_unaligned(bytes);
        if u32::from_le(header.magic) != MAGIC || header.reserved != 0 || header.padding != 0 {
            return Err(FrameError::NotOurs);
        }
        let version = u16::from_le(header.version);
        if version != PROTOCOL {
            return Err(FrameError::Version(version));
        }
        let body = usize::try_from(u32::from_le(header.body_bytes)).unwrap_or(usize::MAX);
        if body > BODY_MAX {
            return Err(FrameError::TooLarge(body));
        }
        Ok((body, u64::from_le(header.sequence)))
    }
}

/// Encodes one message as a whole frame.
///
/// # Errors
/// [`FrameError::TooLarge`] if the message does not fit.
pub fn encode<T: Serialize>(sequence: u64, message: &T) -> Result<Vec<u8>, FrameError> {
    let frame =
        postcard::to_extend(message, vec![0; HEADER_BYTES]).map_err(|_| FrameError::Malformed)?;
    let body = frame.len() - HEADER_BYTES;
    if body > BODY_MAX {
        return Err(FrameError::TooLarge(body));
    }
    let header = Header {
        magic: MAGIC.to_le(),
        version: PROTOCOL.to_le(),
        reserved: 0,
        body_bytes: u32::try_from(body)
            .map_err(|_| FrameError::TooLarge(body))?
            .to_le(),
        padding: 0,
        sequence: sequence.to_le(),
    };
    let mut frame = frame;
    frame[..HEADER_BYTES].copy_from_slice(bytemuck::bytes_of(&header));
    Ok(frame)
}

/// Decodes a whole body.
///
/// # Errors
/// [`FrameError::Malformed`] if it is not exactly one message.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        _ => Err(FrameError::Malformed),
    }
}

/// A chain of block hashes, raw on the wire (32 bytes each).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hashes(pub Vec<BlockHash>);

impl Serialize for Hashes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytemuck::cast_slice(&self.0))
    }
}

impl<'de> Deserialize<'de> for Hashes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Raw;
        impl serde::de::Visitor<'_> for Raw {
            type Value = Hashes;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("block hashes of 32 bytes each")
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Hashes, E> {
                let (hashes, rest) = bytes.as_chunks::<32>();
                if !rest.is_empty() {
                    return Err(E::invalid_length(bytes.len(), &self));
                }
                Ok(Hashes(hashes.iter().copied().map(BlockHash).collect()))
            }
        }
        deserializer.deserialize_bytes(Raw)
    }
}

/// Who says hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// The scheduler side: the only one that reserves, commits and leases.
    Scheduler,
    /// A worker: gets the arena and nothing else.
    Worker {
        /// Its tensor-parallel rank.
        rank: u32,
    },
}

/// First message on every connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Which side connects.
    pub role: Role,
    /// The engine's own id, the same for its scheduler and workers.
    pub engine: String,
    /// Bytes of one block on one rank.
    pub rank_bytes: u64,
    /// Ranks that share a slot.
    pub ranks: u32,
    /// Tokens of one block.
    pub block_tokens: u32,
    /// Blocks in the engine's own pool.
    pub gpu_blocks: u32,
}

/// A finished copy, for the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopySample {
    /// Which kind of copy.
    pub kind: CopyClass,
    /// Every rank has copied everything.
    pub ok: bool,
    /// Bytes moved, all ranks.
    pub bytes: u64,
    /// From submission to completion of the slowest rank.
    pub micros: u64,
}

/// Kinds of copies, in order of urgency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum CopyClass {
    /// A request waits for it.
    Demand,
    /// Ahead of the request.
    Prefetch,
    /// From the GPU to the arena.
    Save,
}

/// Time spent in a hook, for the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookSample {
    /// Which hook.
    pub hook: Hook,
    /// Microseconds.
    pub micros: u32,
}

/// The hooks that are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Hook {
    /// `turn_started`.
    TurnStarted,
    /// `match_prefix`.
    MatchPrefix,
    /// `plan`.
    Plan,
    /// `copies_done`.
    CopiesDone,
    /// `turn_ended`.
    TurnEnded,
}

/// What the engine's figures are since the last report.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// Free blocks in the pool.
    pub gpu_free: u32,
    /// Finished copies; bounded, what is too much is dropped.
    pub copies: Vec<CopySample>,
    /// Timed hooks; bounded, what is too much is dropped.
    pub hooks: Vec<HookSample>,
    /// Lookups that were not answered in time.
    pub timeouts: u64,
    /// Copies that had to be fenced.
    pub fenced: u64,
    /// Blocks found in the host tier, and not found, by demand lookups.
    pub match_hits: u64,
    /// See `match_hits`.
    pub match_misses: u64,
    /// Prefetched blocks that a request used, that were evicted unused, that came after the request, that were cancelled.
    pub prefetch_used: u64,
    /// See `prefetch_used`.
    pub prefetch_wasted: u64,
    /// See `prefetch_used`.
    pub prefetch_late: u64,
    /// See `prefetch_used`.
    pub prefetch_cancelled: u64,
}

impl Figures {
    /// Whether anything is counted. Times of hooks alone are not: they come with every step.
    pub fn count_anything(&self) -> bool {
        let counts = [
            self.timeouts,
            self.fenced,
            self.match_hits,
            self.match_misses,
            self.prefetch_used,
            self.prefetch_wasted,
            self.prefetch_late,
            self.prefetch_cancelled,
        ];
        !self.copies.is_empty() || counts != [0; 8]
    }
}

/// Where a waiting session's KV is on the engine's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Residence {
    /// Kept away from the eviction end.
    Hold,
    /// Ordinary entries, evictable like any other.
    Shadow,
    /// Gone from the GPU, in part or whole.
    Host,
    /// Being copied back.
    Loading,
    /// Back in full.
    Ready,
}

/// News of one waiting session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionNews {
    /// The sidecar's key of the session.
    pub session: u64,
    /// Where it is.
    pub residence: Residence,
    /// Leading blocks readable on the GPU.
    pub gpu_blocks: u32,
}

/// What the engine could do about a [`ToEngine::Want`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WantOutcome {
    /// All of it is on the GPU or on its way.
    Accepted,
    /// Part of it is on its way; the rest does not fit.
    Clipped,
    /// No room now; done when there is.
    Deferred,
    /// The host tier no longer has what is missing.
    Missing,
}

/// Messages from an engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSidecar {
    /// First message.
    Hello(Hello),
    /// Names the namespace that this engine's blocks belong to from now on; before any other message that has hashes.
    /// Answered by [`ToEngine::NamespaceOpen`].
    OpenNamespace {
        /// Digest of everything besides the block hash that decides the bytes.
        id: [u8; 32],
    },
    /// A request was enqueued. Answered by [`ToEngine::Match`].
    TurnStarted {
        /// The engine's number for this request.
        turn: u64,
        /// The request's id as its client sees it.
        request: String,
        /// Session the client named, if any.
        identity: Option<String>,
        /// Full blocks of the prompt.
        hashes: Hashes,
    },
    /// Asks for a lease of the longest committed prefix of `hashes`. Answered by [`ToEngine::Match`].
    Lookup {
        /// A request's number, or a session's key with `for_session`.
        turn: u64,
        /// Whether `turn` is a session's key.
        for_session: bool,
        /// From the first block that the GPU lacks.
        hashes: Hashes,
    },
    /// Asks for slots for blocks that are about to be saved. Answered by [`ToEngine::Reserved`].
    Reserve {
        /// In chain order.
        hashes: Hashes,
    },
    /// All ranks have written a reservation, or its copies have ended unusable.
    Settle {
        /// The reservation.
        lease: u64,
        /// Whether its slots may be read from now on.
        commit: bool,
    },
    /// A read lease is no longer needed; no copy of it is running.
    Release {
        /// The lease.
        lease: u64,
    },
    /// A request ended.
    TurnEnded {
        /// As in `TurnStarted`.
        turn: u64,
        /// Every full block of the turn, prompt and output.
        hashes: Hashes,
    },
    /// A request carried a hint envelope (JSON).
    Hints {
        /// The envelope as the client sent it.
        json: String,
    },
    /// What became of a want; at most one for each.
    Outcome {
        /// The sidecar's key of the session.
        session: u64,
        /// The want's own number.
        want: u64,
        /// What the engine did.
        outcome: WantOutcome,
        /// Blocks on their way or already there.
        blocks: u32,
        /// (slot, GPU block) pairs submitted so far, at most [`PAIRS_MAX`].
        pairs: Vec<(u32, u32)>,
    },
    /// Where waiting sessions are.
    News(Vec<SessionNews>),
    /// Figures since the last report.
    Figures(Box<Figures>),
    /// The engine's weights or cache were reset: a new epoch begins.
    Reset,
    /// Every copy that was started before this connection has ended.
    Fenced,
    /// A worker has mapped the arena and can copy from now on.
    ArenaReady,
}

/// Most pairs in one [`ToSidecar::Outcome`].
pub const PAIRS_MAX: usize = 1024;

/// How much the planner wants a session on the GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wish {
    /// Forget the session.
    Nothing,
    /// Keep what is there while the hold lasts; bring nothing back.
    Keep,
    /// Bring it back as soon as there is room, without ping-pong.
    WhenRoom,
    /// Bring it back at once: its next request is due.
    Now,
}

impl Wish {
    /// Whether the session is brought back, and what it has left on the GPU spared.
    pub fn comes_back(self) -> bool {
        matches!(self, Self::Now | Self::WhenRoom)
    }
}

/// Messages to an engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToEngine {
    /// Answers a hello. A descriptor comes with it: a worker's is the arena, the scheduler side's the presence filter, if
    /// there is one.
    Welcome {
        /// Identifies this start of the sidecar, and so the arena.
        boot: u64,
        /// Bytes of the file that comes with it, or 0.
        file_bytes: u64,
        /// Bytes of one slot.
        slot_bytes: u64,
    },
    /// Answers a hello that cannot be accepted.
    Refused {
        /// What is wrong and what to do.
        reason: String,
    },
    /// Answers `OpenNamespace`: every lease that was given before belongs to an earlier namespace.
    NamespaceOpen,
    /// Every worker of this engine has the arena (or one has lost it).
    Workers {
        /// All there.
        ready: bool,
    },
    /// Answers `TurnStarted` and `Lookup`.
    Match {
        /// As asked.
        turn: u64,
        /// As asked.
        for_session: bool,
        /// The session that the request belongs to.
        session: u64,
        /// The lease, unless there is nothing.
        lease: Option<u64>,
        /// Leased slots, in the order of the hashes.
        slots: Vec<u32>,
        /// Milliseconds that the lease lasts.
        ttl_ms: u32,
    },
    /// Answers `Reserve`.
    Reserved {
        /// The reservation, unless nothing was granted.
        lease: Option<u64>,
        /// (index into the hashes asked for, slot): what is not already there or on its way, as far as there was room.
        slots: Vec<(u32, u32)>,
        /// Milliseconds that the reservation lasts.
        ttl_ms: u32,
    },
    /// What the planner wants for a session from now on; replaces what it wanted before.
    Want {
        /// The sidecar's key of the session.
        session: u64,
        /// Number of this want, for its outcome.
        want: u64,
        /// How much.
        wish: Wish,
        /// In thousandths: of two sessions that are due, the one with the higher priority comes first.
        priority: i32,
        /// Milliseconds until it is expected back; `None`: nobody knows.
        expected_ms: Option<u32>,
        /// Milliseconds from now that its blocks should be held.
        hold_ms: u32,
        /// Its chain.
        hashes: Hashes,
        /// With [`Wish::Now`]: a lease of the chain's committed prefix and its slots.
        lease: Option<u64>,
        /// See `lease`.
        slots: Vec<u32>,
        /// Milliseconds that the lease lasts.
        ttl_ms: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello() -> ToSidecar {
        ToSidecar::Hello(Hello {
            role: Role::Worker { rank: 1 },
            engine: "e".into(),
            rank_bytes: 1 << 20,
            ranks: 2,
            block_tokens: 16,
            gpu_blocks: 400,
        })
    }

    #[test]
    fn frames_round_trip() {
        for message in [
            hello(),
            ToSidecar::TurnStarted {
                turn: 7,
                request: "cmpl-1".into(),
                identity: Some("agent".into()),
                hashes: Hashes(vec![BlockHash([3; 32]), BlockHash([9; 32])]),
            },
            ToSidecar::Figures(Box::default()),
        ] {
            let frame = encode(42, &message).unwrap();
            let (body, sequence) =
                Header::parse(frame[..HEADER_BYTES].try_into().unwrap()).unwrap();
            assert_eq!((body, sequence), (frame.len() - HEADER_BYTES, 42));
            assert_eq!(
                decode::<ToSidecar>(&frame[HEADER_BYTES..]).unwrap(),
                message
            );
        }
    }

    #[test]
    fn header_refusals_name_the_cause() {
        let good = encode(1, &hello()).unwrap();
        let mut head: [u8; HEADER_BYTES] = good[..HEADER_BYTES].try_into().unwrap();
        head[4] = 9;
        assert_eq!(Header::parse(&head), Err(FrameError::Version(9)));
        head[0] ^= 1;
        assert_eq!(Header::parse(&head), Err(FrameError::NotOurs));
        let mut head: [u8; HEADER_BYTES] = good[..HEADER_BYTES].try_into().unwrap();
        head[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(
            Header::parse(&head),
            Err(FrameError::TooLarge(u32::MAX as usize))
        );
    }

    #[test]
    fn numbers_rise_and_gaps_are_fine() {
        let mut rising = Rising::default();
        assert_eq!(rising.take(0), Err(FrameError::OutOfOrder(0)));
        for number in [1, 2, 7] {
            assert_eq!(rising.take(number), Ok(()));
        }
        for late in [7, 3, 0] {
            assert_eq!(rising.take(late), Err(FrameError::OutOfOrder(late)));
        }
        assert_eq!(rising.take(8), Ok(()));
    }

    #[test]
    fn trailing_bytes_and_ragged_hashes_are_refused() {
        let mut body = encode(0, &ToSidecar::Reset)
            .unwrap()
            .split_off(HEADER_BYTES);
        body.push(0);
        assert_eq!(decode::<ToSidecar>(&body), Err(FrameError::Malformed));
        let ragged = postcard::to_stdvec(&[1u8; 33][..]).unwrap();
        assert!(postcard::from_bytes::<Hashes>(&ragged).is_err());
    }

    #[test]
    fn oversized_messages_are_refused_before_they_are_sent() {
        let message = ToSidecar::Reserve {
            hashes: Hashes(vec![BlockHash([0; 32]); BODY_MAX / 32 + 1]),
        };
        assert!(matches!(encode(0, &message), Err(FrameError::TooLarge(_))));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Some(head) = bytes.first_chunk::<HEADER_BYTES>() {
                prop_assert!(Header::parse(head).is_err() || head.starts_with(b"GRM1"));
            }
            if let Ok(message) = decode::<ToSidecar>(&bytes) {
                prop_assert!(encode(0, &message).is_ok());
            }
            if let Ok(message) = decode::<ToEngine>(&bytes) {
                prop_assert!(encode(0, &message).is_ok());
            }
        }

        #[test]
        fn mutated_frames_decode_or_are_refused(at in 0usize..200, xor in 1u8.., cut in 0usize..200) {
            let message = ToSidecar::TurnStarted {
                turn: 1, request: "r".into(), identity: None, hashes: Hashes(vec![BlockHash([5; 32]); 4]),
            };
            let mut body = encode(0, &message).unwrap().split_off(HEADER_BYTES);
            let at = at % body.len();
            body[at] ^= xor;
            body.truncate(body.len() - cut % body.len());
            if let Ok(decoded) = decode::<ToSidecar>(&body) {
                prop_assert_ne!(decoded, message);
            }
        }
    }
}
