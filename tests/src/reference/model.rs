//! The model: a decoder with learned positions and grouped-query attention in float32, its weights drawn from a seed, cut
//! by heads over tensor-parallel ranks.
//!
//! A call computes the rows of one whole block, whatever it was asked for; rows after the last token are thrown away.
//! So every product has a shape that follows from the position alone, and a token's KV and logits have the same bits
//! whether it came with a prompt, was generated, or is computed again after a loss.

use candle_core::{Device, IndexOp, Result, Tensor};
use kvstore::GpuBlock;

use crate::random::Random;
use crate::worker::Memory;

/// Tokens of a block.
pub const BLOCK: usize = 8;
/// Different tokens.
pub const VOCABULARY: usize = 64;
/// Tokens of a sequence, at most: one row of learned positions each.
const TOKENS_MAX: usize = 1024;
const LAYERS: usize = 2;
const HIDDEN: usize = 32;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
/// Query heads that share one head of keys and values.
const GROUP: usize = HEADS / KV_HEADS;
const HEAD: usize = 8;
const INNER: usize = 64;

/// Regions of a rank's memory: the keys and the values of each layer.
pub(super) const REGIONS: usize = 2 * LAYERS;

/// Products below this many multiplications are done by the calling thread alone, in an order that their shape decides.
const SERIAL_MULTIPLICATIONS: usize = 48 * 48 * 256;
const _: () = assert!(GROUP * BLOCK * TOKENS_MAX * HEAD < SERIAL_MULTIPLICATIONS);
const _: () = assert!(BLOCK * HIDDEN * VOCABULARY < SERIAL_MULTIPLICATIONS);

/// The weights.
pub struct Model {
    ranks: u32,
    tokens: Tensor,
    positions: Tensor,
    causal: Tensor,
    /// By layer and rank.
    layers: Vec<Vec<Shard>>,
    head: Tensor,
}

/// One rank's part of a layer.
struct Shard {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    up: Tensor,
    down: Tensor,
}

/// Rows to compute: the tokens of one block from `from` on, to the end of `tokens`.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// The sequence up to the last row.
    pub tokens: &'a [u32],
    /// Position of the first row whose KV is not in memory yet.
    pub from: usize,
    /// The sequence's blocks.
    pub table: &'a [GpuBlock],
}

impl Rows<'_> {
    /// Position of the block's first row.
    fn start(&self) -> usize {
        self.from / BLOCK * BLOCK
    }
}

impl Model {
    /// The model of a seed. The same seed gives the same weights for every number of ranks.
    pub fn new(seed: u64, ranks: u32) -> Self {
        assert!(
            ranks as usize <= KV_HEADS,
            "a rank has at least one KV head"
        );
        Self::build(&mut Random::new(seed), ranks).unwrap()
    }

    fn build(random: &mut Random, ranks: u32) -> Result<Self> {
        let tokens = weights(random, (VOCABULARY, HIDDEN), 1)?;
        let positions = weights(random, (TOKENS_MAX, HIDDEN), 1)?;
        let layers = (0..LAYERS).map(|_| layer(random, ranks as usize));
        Ok(Self {
            ranks,
            tokens,
            positions,
            causal: causal()?,
            layers: layers.collect::<Result<_>>()?,
            head: weights(random, (HIDDEN, VOCABULARY), HIDDEN)?,
        })
    }

    /// Bytes of a block on each of so many ranks.
    pub fn rank_bytes(ranks: u32) -> usize {
        REGIONS * BLOCK * KV_HEADS * HEAD * size_of::<f32>() / ranks as usize
    }

    /// Computes rows, writes their KV into each rank's memory, and returns the logits of the last one.
    pub fn compute(&self, rows: Rows<'_>, memories: &[&Memory]) -> Vec<f32> {
        let end = rows.tokens.len();
        assert!(rows.from < end && end <= rows.start() + BLOCK && end <= TOKENS_MAX);
        assert_eq!(memories.len(), self.ranks as usize);
        self.forward(rows, memories).unwrap()
    }

    fn forward(&self, rows: Rows<'_>, memories: &[&Memory]) -> Result<Vec<f32>> {
        let start = rows.start();
        let mut tokens = rows.tokens[start..].to_vec();
        tokens.resize(BLOCK, 0);
        let tokens = Tensor::from_vec(tokens, BLOCK, &Device::Cpu)?;
        let positions = self.positions.narrow(0, start, BLOCK)?;
        let mut x = (self.tokens.index_select(&tokens, 0)? + positions)?;
        // All that came before the block is seen by all of its rows.
        let mask = self.causal.pad_with_zeros(2, start, 0)?;
        for (layer, shards) in self.layers.iter().enumerate() {
            let input = normed(&x)?;
            for (shard, memory) in shards.iter().zip(memories.iter().copied()) {
                x = (x + shard.attend(&input, &mask, rows, (memory, 2 * layer))?)?;
            }
            let input = normed(&x)?;
            for shard in shards {
                x = (x + input.matmul(&shard.up)?.silu()?.matmul(&shard.down)?)?;
            }
        }
        let logits = normed(&x)?.matmul(&self.head)?;
        logits.i(rows.tokens.len() - 1 - start)?.to_vec1()
    }
}

impl Shard {
    /// This rank's part of the attention's output. Its memory has the KV of the blocks before, and gets that of the rows.
    fn attend(
        &self,
        input: &Tensor,
        mask: &Tensor,
        rows: Rows<'_>,
        (memory, region): (&Memory, usize),
    ) -> Result<Tensor> {
        let heads = self.key.dim(1)? / HEAD;
        let all = |fresh: Tensor, region| -> Result<Tensor> {
            let fresh: Vec<f32> = fresh.flatten_all()?.to_vec1()?;
            let entries = through_memory(&fresh, rows, memory, region);
            let shape = (entries.len() / (heads * HEAD), heads, HEAD);
            Tensor::from_vec(entries, shape, &Device::Cpu)
        };
        let keys = all(input.matmul(&self.key)?, region)?.permute((1, 2, 0))?;
        let values = all(input.matmul(&self.value)?, region + 1)?.permute((1, 0, 2))?;
        // The rows of all query heads that share a KV head, one below the other.
        let queries = input
            .matmul(&self.query)?
            .reshape((BLOCK, heads, GROUP, HEAD))?
            .permute((1, 2, 0, 3))?
            .reshape((heads, GROUP * BLOCK, HEAD))?;
        let scores = (queries.matmul(&keys.contiguous()?)? * (HEAD as f64).powf(-0.5))?;
        let scores = scores.broadcast_add(mask)?;
        let scores = scores.broadcast_sub(&scores.max_keepdim(2)?)?.exp()?;
        let scores = scores.broadcast_div(&scores.sum_keepdim(2)?)?;
        scores
            .matmul(&values.contiguous()?)?
            .reshape((heads, GROUP, BLOCK, HEAD))?
            .permute((2, 0, 1, 3))?
            .reshape((BLOCK, heads * GROUP * HEAD))?
            .matmul(&self.output)
    }
}

/// Writes the KV of the rows that are new into their block, and reads that of all blocks before: what attention sees of
/// them is what the pool holds. `fresh` has all rows of the block.
fn through_memory(fresh: &[f32], rows: Rows<'_>, memory: &Memory, region: usize) -> Vec<f32> {
    let (row, block) = (fresh.len() / BLOCK, rows.start() / BLOCK);
    let new = (rows.from - rows.start()) * row..(rows.tokens.len() - rows.start()) * row;
    let offset = new.start * size_of::<f32>();
    let bytes = bytemuck::cast_slice(&fresh[new]);
    memory.write(rows.table[block], region, offset, bytes);
    let mut entries = vec![0.0; (block + 1) * fresh.len()];
    let (before, this) = entries.split_at_mut(block * fresh.len());
    for (gpu_block, into) in rows.table.iter().zip(before.chunks_exact_mut(fresh.len())) {
        memory.read(*gpu_block, region, 0, bytemuck::cast_slice_mut(into));
    }
    this.copy_from_slice(fresh);
    entries
}

/// What is added to the scores of a block's rows against the positions of the block itself, for each head of a group.
fn causal() -> Result<Tensor> {
    let rows = (0..GROUP).flat_map(|_| 0..BLOCK);
    let cells = rows.flat_map(|row| (0..BLOCK).map(move |position| (row, position)));
    let seen = cells.map(|(row, position)| position <= row);
    let mask: Vec<f32> = seen
        .map(|seen| if seen { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    Tensor::from_vec(mask, (1, GROUP * BLOCK, BLOCK), &Device::Cpu)
}

fn normed(x: &Tensor) -> Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(1)? + 1e-5)?.sqrt()?;
    x.broadcast_div(&scale)
}

/// Evenly distributed, with the variance that keeps a product over `inputs` of them near one.
fn weights(random: &mut Random, shape: (usize, usize), inputs: usize) -> Result<Tensor> {
    let width = (12.0 / inputs as f32).sqrt();
    let one = |_| (random.number() >> 40) as f32 / (1 << 24) as f32 - 0.5;
    let values: Vec<f32> = (0..shape.0 * shape.1).map(one).map(|v| v * width).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

fn layer(random: &mut Random, ranks: usize) -> Result<Vec<Shard>> {
    let query = weights(random, (HIDDEN, HEADS * HEAD), HIDDEN)?;
    let key = weights(random, (HIDDEN, KV_HEADS * HEAD), HIDDEN)?;
    let value = weights(random, (HIDDEN, KV_HEADS * HEAD), HIDDEN)?;
    let output = weights(random, (HEADS * HEAD, HIDDEN), HEADS * HEAD)?;
    let up = weights(random, (HIDDEN, INNER), HIDDEN)?;
    let down = weights(random, (INNER, HIDDEN), INNER)?;
    let part = |whole: &Tensor, dim: usize, rank: usize| {
        let size = whole.dim(dim)? / ranks;
        whole.narrow(dim, rank * size, size)?.contiguous()
    };
    let shard = |rank| -> Result<Shard> {
        Ok(Shard {
            query: part(&query, 1, rank)?,
            key: part(&key, 1, rank)?,
            value: part(&value, 1, rank)?,
            output: part(&output, 0, rank)?,
            up: part(&up, 1, rank)?,
            down: part(&down, 0, rank)?,
        })
    };
    (0..ranks).map(shard).collect()
}
