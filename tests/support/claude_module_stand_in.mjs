// A stand-in for Claude Code 2.1.332 that loads a module: a session with turns, notes, an inbox, a transcript and the
// registry entry, and the real server of agentbus below it.
//
//   node claude_module_stand_in.mjs MODULE SERVER [words of the server's command]
//
// Orders come as lines of JSON on stdin, what happens goes out as lines of JSON on stdout. As measured, see MOD.md: a
// prompt of a plugin waits for the end of a turn, and is refused while the session is stopped; a note goes with the next
// request; a post to the inbox goes with the next request, or begins a turn.
import { spawn } from "node:child_process"
import { appendFileSync, existsSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs"
import http from "node:http"
import net from "node:net"
import { join } from "node:path"
import { createInterface } from "node:readline"

const [file, ...command] = process.argv.slice(2)
const say = (said) => process.stdout.write(JSON.stringify(said) + "\n")
const settings = process.env.CLAUDE_CONFIG_DIR
const session = "11111111-2222-4333-8444-555555555555"
const projects = join(settings, "projects", process.cwd().replace(/[/.]/g, "-"))
const transcript = join(projects, `${session}.jsonl`)
const entry = join(settings, "sessions", `${process.pid}.json`)
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms))

const hooks = { "session.start": [], "turn.start": [], "turn.complete": [] }
const startedAt = Date.now()
let isBusy = false
let isStopped = false
let isLong = false
const notes = [] // accepted, and carried by no request
let prompts = [] // wait for the end of the turn
const posts = [] // came by the inbox while the session was busy

const write = (row) => appendFileSync(transcript, JSON.stringify({ isSidechain: false, timestamp: new Date().toISOString(), ...row }) + "\n")
const record = (content, heldContent = []) =>
  write({ type: "attachment", attachment: { type: "plugin_note", plugin: "agentbus", content, heldContent } })

function status() {
  const started = readFileSync("/proc/self/stat", "utf8").split(") ").pop().split(" ")[19]
  const state = isBusy ? "busy" : "idle"
  writeFileSync(entry, JSON.stringify({ pid: process.pid, procStart: started, sessionId: session, cwd: process.cwd(), version: "2.1.332", startedAt, status: state }))
}

const fire = async (name, event) => {
  for (const hook of hooks[name]) await hook($, event, async (same) => same)
}

// A request to the model: what is new in it.
function request(early, text) {
  const late = notes.splice(0)
  const carried = posts.splice(0)
  if (early.length + late.length) record([...early, ...late])
  for (const post of carried) write({ type: "attachment", attachment: { type: "queued_command", prompt: post } })
  say({ request: [...early, text, ...carried, ...late] })
}

async function turn(text, waits = isLong) {
  isBusy = true
  status()
  await fire("turn.start", { text })
  await sleep(20)
  // A note that was accepted before the prompt is recorded stands before it in the request, a later one behind it.
  const early = notes.splice(0)
  write({ type: "user", message: { role: "user", content: text } })
  await sleep(20)
  request(early, text)
  if (!waits) await end()
}

async function end() {
  isBusy = false
  status()
  await fire("turn.complete", {})
  if (!isBusy && posts.length) await turn(posts.shift(), false)
  if (!isBusy && prompts.length) {
    const waiting = prompts
    prompts = []
    for (const { resolve, text } of waiting) resolve({ text, origin: { kind: "plugin" } })
    await turn(waiting.map((one) => one.text).join("\n"), false)
  }
}

const $ = {
  env: { get: async (name) => process.env[name] },
  clock: { sleep },
  fs: {
    exists: async (path) => existsSync(path),
    list: async (path) => readdirSync(path).map((name) => ({ name })),
  },
  process: { hookEnv: async () => ({ CLAUDE_PID: String(process.pid) }) },
  http: {
    fetch: (url, { method, socketPath, body }) =>
      new Promise((resolve, reject) => {
        const asking = http.request({ socketPath, path: new URL(url).pathname, method }, (answer) => {
          let text = ""
          answer.setEncoding("utf8").on("data", (data) => (text += data))
          answer.on("end", () => resolve({ ok: answer.statusCode === 200, status: answer.statusCode, text }))
          answer.on("error", reject)
        })
        asking.on("error", reject)
        asking.end(body)
      }),
  },
  prompt: {
    submit: ({ text }) => {
      if (isStopped) return Promise.resolve({ drop: "the session was stopped and nobody has sent input since" })
      if (isBusy) return new Promise((resolve) => prompts.push({ text, resolve }))
      return new Promise((resolve) => {
        resolve({ text, origin: { kind: "plugin" } })
        void turn(`The agentbus plugin sent a message:\n${text}`)
      })
    },
  },
  session: {
    append: async ({ message }) => {
      const text = message.content[0].text
      notes.push(text)
      if (!isBusy) record([], [text])
      say({ noted: text })
      return { message, uuid: "u" }
    },
  },
}

function inbox() {
  const path = join(settings, `inbox-${process.pid}.sock`)
  net
    .createServer((peer) => {
      let data = ""
      peer.setEncoding("utf8").on("data", (piece) => (data += piece))
      peer.on("end", () => {
        for (const line of data.split("\n").filter(Boolean)) {
          const said = JSON.parse(line)
          if (said.type !== "user") continue
          isStopped = false
          if (isBusy) posts.push(said.message.content)
          else void turn(`Another Claude session sent a message:\n${said.message.content}`)
        }
      })
    })
    .listen(path)
  return path
}

const orders = {
  // The user's own words begin a turn; a `long` one lasts until `end`.
  say: ({ text, long }) => {
    isStopped = false
    return turn(text, Boolean(long))
  },
  tool: () => request([], "the result of a tool"), // the next request of the same turn
  turns: ({ long }) => (isLong = long), // those that nobody has asked for
  end,
  escape: async () => {
    isStopped = true
    for (const { resolve } of prompts) resolve({ drop: "the prompt was removed from the queue before it ran" })
    prompts = []
    if (notes.length) record([], notes)
    await end()
  },
  subagent: () => fire("turn.start", { agentId: "a1" }),
  mode: ({ mode }) => write({ type: "user", permissionMode: mode, message: { role: "user", content: "x" } }),
  restart: () =>
    new Promise((resolve) => {
      server.on("exit", () => resolve(serve()))
      server.kill()
    }),
}

mkdirSync(projects, { recursive: true })
mkdirSync(join(settings, "sessions"), { recursive: true })
status()
const messaging = { CLAUDE_CODE_MESSAGING_SOCKET: inbox(), CLAUDE_CODE_MESSAGING_TOKEN: "t" }
let server
function serve() {
  const started = spawn(command[0], command.slice(1), { env: { ...process.env, CLAUDECODE: "1", ...messaging }, stdio: ["pipe", "pipe", "inherit"] })
  const tell = (said) => started.stdin.write(JSON.stringify({ jsonrpc: "2.0", ...said }) + "\n")
  const clientInfo = { name: "claude-code", version: "2.1.332" }
  tell({ id: 1, method: "initialize", params: { protocolVersion: "2025-11-25", capabilities: {}, clientInfo } })
  createInterface({ input: started.stdout }).on("line", (line) => {
    const said = JSON.parse(line)
    if (said.id === 1) {
      tell({ method: "notifications/initialized" })
      tell({ id: 2, method: "tools/list" })
    } else if (said.id === 2) say({ ready: started.pid })
  })
  server = started
}
serve()

if (file !== "none") {
  const { register } = await import(file)
  register((name, hook) => hooks[name].push(hook))
  await fire("session.start", {})
}
const lines = createInterface({ input: process.stdin })
lines.on("line", async (line) => {
  const { do: what, ...order } = JSON.parse(line)
  await orders[what](order)
  say({ done: what })
})
lines.on("close", () => {
  server.stdin.end()
  server.on("exit", () => {
    rmSync(entry, { force: true })
    process.exit(0)
  })
})
