// A stand-in for OpenCode 1.18: loads a plugin file, starts the server that its config hook registers, and has sessions.
//
//   node opencode_stand_in.mjs PLUGIN [words of OpenCode's own, such as -c]
//
// Orders come as lines of JSON on stdin, what happens goes out as lines of JSON on stdout. As recorded: a prompt of a busy
// session joins its next request; the same message id again in a session changes nothing; the same id in another session
// is answered and swallowed; an unknown session is a 404; a deleted one too.
import { spawn } from "node:child_process"
import { createInterface } from "node:readline"

const [file] = process.argv.slice(2)
const say = (said) => process.stdout.write(JSON.stringify(said) + "\n")
const sessions = new Map()
const ids = new Set()
const fault = { lose: 0, refuse: 0 } // so many prompts are stored and never run, or fail
let made = 0
let hooks
let shown = ""

function add({ parentID, agent = "build", id } = {}) {
  made += 1
  id ??= `ses_${made}`
  const session = { id, parentID, agent, time: { updated: Date.now() + made }, messages: [], isBusy: false, isLong: false }
  sessions.set(id, session)
  emit("session.created", { info: info(session) })
  return session
}

const info = ({ id, parentID, agent, time, revert }) => ({ id, parentID, agent, time, revert })
const emit = (type, properties) => hooks?.event({ event: { type, properties } })

async function prompt(session, message) {
  await hooks["chat.message"]({ sessionID: session.id, agent: message.info.agent }, { message: message.info, parts: message.parts })
  session.messages.push(message)
  session.agent = message.info.agent
  session.revert = undefined
  emit("session.updated", { info: info(session) })
}

// One request to the model for all that is there; a session that is long stays busy until it is told to end.
async function run(session) {
  if (session.isBusy) return
  session.isBusy = true
  emit("session.status", { sessionID: session.id, status: { type: "busy" } })
  do {
    session.asked = session.messages.length
    await hooks["experimental.chat.messages.transform"]({}, { messages: session.messages })
    say({ request: session.id, agent: session.agent, texts: session.messages.map((one) => one.parts[0].text) })
    while (session.isLong) await new Promise((resolve) => setTimeout(resolve, 5))
  } while (session.messages.length > session.asked)
  session.isBusy = false
  emit("session.status", { sessionID: session.id, status: { type: "idle" } })
  emit("session.idle", { sessionID: session.id })
}

const found = (id) => {
  const session = sessions.get(id)
  return session ? { data: session, response: { status: 200 } } : { error: { name: "NotFound" }, response: { status: 404 } }
}

const client = {
  session: {
    get: async ({ path }) => {
      const { data, ...rest } = found(path.id)
      return data ? { data: info(data), ...rest } : rest
    },
    list: async () => ({ data: [...sessions.values()].map(info) }),
    create: async () => ({ data: info(add()) }),
    promptAsync: async ({ path, body }) => {
      const { data: session, ...rest } = found(path.id)
      if (!session) return rest
      if (fault.refuse > 0) {
        fault.refuse -= 1
        return { error: { name: "Unknown" }, response: { status: 500 } }
      }
      const isNew = !ids.has(body.messageID)
      say({ posted: path.id, message: body.messageID, agent: body.agent, again: !isNew })
      ids.add(body.messageID)
      if (isNew) {
        const message = { info: { id: body.messageID, role: "user", agent: body.agent ?? "build", sessionID: path.id }, parts: body.parts }
        await prompt(session, message)
      }
      if (isNew && fault.lose > 0) fault.lose -= 1
      else if (session.messages.length > (session.asked ?? 0)) run(session)
      return { data: undefined, response: { status: 204 } }
    },
  },
  tui: {
    publish: async ({ body }) => {
      shown = body.properties.sessionID
      say({ shown })
    },
  },
}

const orders = {
  create: (order) => add(order),
  say: async ({ session, text, agent = "build" }) => {
    const of = sessions.get(session)
    await prompt(of, { info: { id: `msg_user${++made}`, role: "user", agent, sessionID: session }, parts: [{ type: "text", text }] })
    run(of)
  },
  long: ({ session, is }) => (sessions.get(session).isLong = is),
  undo: ({ session, is }) => {
    const of = sessions.get(session)
    of.revert = is ? { messageID: "msg_x" } : undefined
    emit("session.updated", { info: info(of) })
  },
  delete: ({ session }) => {
    const of = sessions.get(session)
    sessions.delete(session)
    emit("session.deleted", { info: info(of) })
  },
  fault: (order) => Object.assign(fault, order),
  tool: async ({ session, tool }) => {
    try {
      await hooks["tool.execute.before"]({ tool, sessionID: session, callID: "call_1" }, { args: {} })
      say({ tool: "runs" })
    } catch (error) {
      say({ tool: error.message })
    }
  },
  call: ({ name, args }) => ask("tools/call", { name, arguments: args ?? {} }).then((answer) => say({ result: answer.content[0].text })),
  dispose: () => hooks.dispose(),
}

let server
let asked = 0
const answers = new Map()
const ask = (method, params) =>
  new Promise((resolve) => {
    answers.set(++asked, resolve)
    server.stdin.write(JSON.stringify({ jsonrpc: "2.0", id: asked, method, params }) + "\n")
  })

async function start() {
  for (const order of JSON.parse(process.env.STAND_IN_SESSIONS ?? "[]")) add(order)
  const plugin = Object.values(await import(file))[0]
  hooks = await plugin({ client, directory: process.cwd() })
  // Twice for one folder, as with --port.
  if (process.env.STAND_IN_TWICE) hooks = await plugin({ client, directory: process.cwd() })
  const config = { mcp: JSON.parse(process.env.STAND_IN_MCP ?? "{}") }
  await hooks.config(config)
  const entry = config.mcp.agentbus
  say({ entry })
  const env = { ...process.env, OPENCODE: "1", OPENCODE_PID: String(process.pid), ...entry.environment }
  server = spawn(entry.command[0], entry.command.slice(1), { env, stdio: ["pipe", "pipe", "inherit"] })
  server.on("exit", (code) => say({ server: code }))
  createInterface({ input: server.stdout }).on("line", (line) => {
    const said = JSON.parse(line)
    answers.get(said.id)?.(said.result)
  })
  const capabilities = { roots: {} }
  const welcome = await ask("initialize", { protocolVersion: "2025-11-25", capabilities, clientInfo: { name: "opencode", version: "1.18.33" } })
  server.stdin.write('{"jsonrpc":"2.0","method":"notifications/initialized"}\n')
  await ask("tools/list", {})
  say({ ready: welcome.instructions, server: server.pid })
}

createInterface({ input: process.stdin })
  .on("line", async (line) => {
    const order = JSON.parse(line)
    await orders[order.do](order)
    say({ done: order.do })
  })
  .on("close", () => {
    server?.stdin.end()
    server?.on("exit", () => process.exit(0))
  })
await start()
